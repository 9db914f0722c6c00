/* Paths, folders and files that must be on disk before the program goes on. */
#ifndef TATARA_FILES_H
#define TATARA_FILES_H

/* Paths, each owned. Zero-initialised is empty. */
struct path_list {
    char **path;
    int n, capacity;
};

/* folder/name, or name alone when folder is NULL. The caller frees *path. */
int path_join(char **path, const char *folder, const char *name);
/* The part after the last slash. */
const char *path_name(const char *path);
/* Appends folder/name, or name alone when folder is NULL. */
int path_list_add(struct path_list *list, const char *folder, const char *name);
/* Appends the names in a folder but "." and "..", sorted by bytes, so that the order is the same in every locale.
 * ERR_DATA when it is not there. */
int path_list_folder(struct path_list *list, const char *folder);
void path_list_free(struct path_list *list);

/* ERR_DATA, with the remedy, when the file is a pointer of Git LFS, in place of what was meant. */
int file_check_fetched(const char *path);
/* Brings a file to disk; a folder, fs_sync_folder does. */
int file_sync(const char *path);
/* Writes a text file and brings it to disk. */
int file_write_text(const char *path, const char *text);

#endif
