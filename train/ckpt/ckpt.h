/* Checkpoints: a folder step-00001000/ of one HDF5 file per rank, an index of virtual datasets and a manifest.
 *
 * Knows no models: the caller names the tensors and says which flat range of each this rank holds. Nothing in a
 * checkpoint depends on how many ranks wrote it; any number of ranks may load any ranges. A folder without its manifest
 * is not a checkpoint. */
#ifndef TATARA_CKPT_H
#define TATARA_CKPT_H

#include "comm.h"
#include "tensor.h"

#define CKPT_NAME_MAX 160
#define CKPT_PATH_MAX 1024
#define CKPT_OWNER_MAX 64

/* A run's folder as this attempt opened it. A later attempt that opens the same folder becomes its owner, and the
 * earlier one can then save nothing more. Equal on all ranks but for the heart. */
struct ckpt_run {
    char dir[CKPT_PATH_MAX];
    char owner[CKPT_OWNER_MAX]; /* this attempt: job, restart count and a random number */
    bool continued;             /* the folder was an earlier attempt's of the same job or chain of jobs */
    struct ckpt_heart *heart;   /* on rank 0, owned */
};

/* Elements [begin, end) in row-major order of one named tensor, f32. A name with a slash lies in a group of the index
 * ("optim/exp_avg/model.norm.weight"). The union of the ranks' ranges is the whole tensor, without overlap. */
struct ckpt_slab {
    char name[CKPT_NAME_MAX];
    int ndim;
    int64_t shape[TENSOR_MAX_DIMS];
    int64_t begin, end; /* begin == end: nothing of it on this rank */
    float *data;        /* host memory, end − begin elements */
};

/* Where a slab's data best lie at or after `from`, less than CKPT_ALIGN bytes behind it: there a save needs no copy. */
#define CKPT_ALIGN 4096
float *ckpt_slab_place(const struct ckpt_slab *slab, float *from);
/* The bytes that a slab will take in a checkpoint, its data aside from `data`: they and a bound on what describes them in the
 * rank's file, the index and the manifest. */
int64_t ckpt_slab_bytes(const struct ckpt_slab *slab);
/* A bound on the bytes that a checkpoint by so many ranks takes besides its slabs. */
int64_t ckpt_frame_bytes(int ranks);

/* What is kept of a run's checkpoints. */
struct ckpt_keep {
    int64_t newest;
    int64_t every; /* and all of steps that are multiples of this; 0: none */
    bool back; /* and the newest of step back_from and those after it that are multiples of back_every (0: none) */
    int64_t back_from, back_every;
};

/* What is stored beside the tensors. */
struct ckpt_meta {
    int64_t step; /* optimizer steps done */
    int64_t
        sequences; /* read so far, those left out included: the data position; −1: not stored, by an older version */
    int64_t optim_steps;   /* that the moments have seen: `step`, and those of the run whose moments it began with */
    double grad_scale;     /* of reduce: exact; a power of two */
    double grad_norm;      /* of the last step, from which the next scale comes; 0 before the first */
    uint64_t model_id;     /* hash of what makes two models incompatible: names and shapes of all parameters */
    uint64_t tokenizer_id; /* XXH3 of the tokenizer's file; 0: none */
    int64_t bos, eos;      /* the tokens before and after each document of the data; −1: none, or not known */
    double tokens;         /* trained so far */
    /* What faulty steps left behind: how many there were, batches left out since, and the recent losses' statistics. */
    int64_t faults, batches_skipped, loss_seen;
    double loss_mean, loss_variance;
    int64_t began;     /* the step before which no rewind goes: not 0 where older checkpoints may be another run's */
    char *config_yaml; /* the effective configuration; on load owned by the caller, who frees it */
    char *record;      /* a JSON object: what the caller says of data and arithmetic; NULL: nothing. Owned likewise */
    char version[64];  /* of the program that wrote it */
};

/* Saves step meta->step into run->dir/step-%08d, and then removes the oldest complete checkpoints that `keep` does not
 * keep, newer steps than this one aside. A damaged folder of that step is replaced; a complete one never: saving the same tensors
 * again is a success that changes nothing, saving others is ERR_CONFIG. On any error the temporary folder is deleted,
 * earlier checkpoints are untouched, and all ranks return the same code (ERR_SYSTEM names file and reason, for example a
 * full disk). Slab lists must name the same tensors in the same order on all ranks. Collective. */
int ckpt_save(struct comm *comm, const struct ckpt_run *run, const struct ckpt_meta *meta,
              const struct ckpt_slab *slabs, int n, struct ckpt_keep keep);

/* The same in the background, one save at a time: a thread of each rank writes its file, then one of rank 0 commits. The
 * main thread starts a save, asks now and then whether all ranks are ready, and then lets all advance. */
struct ckpt_saver;
int ckpt_saver_open(struct ckpt_saver **saver, struct comm *comm, const struct ckpt_run *run);
/* Puts the tokenizer's model into every checkpoint from now on, so that a copied folder can be sampled anywhere. The model
 * is rank 0's, and stays as it is until the saver is closed; other ranks, and runs without a tokenizer, give 0 bytes. */
void ckpt_saver_add_tokenizer(struct ckpt_saver *saver, const void *model, size_t bytes);
/* Starts it; what can be refused at once, is. The slabs' data must stay as they are until the save has ended. `fill`,
 * when given, is called first of all in the writing thread, and may write the slabs' data; where it fails the save ends
 * with its error. Collective. */
int ckpt_save_start(struct ckpt_saver *saver, const struct ckpt_meta *meta, const struct ckpt_slab *slabs, int n,
                    struct ckpt_keep keep, int (*fill)(void *context), void *context);
/* Whether a save is under way; the same on all ranks. */
bool ckpt_save_busy(const struct ckpt_saver *saver);
/* How the ranks' files of the last save came to disk: in so many seconds on the slowest rank, and their bytes together. */
struct ckpt_written {
    double s;
    int64_t bytes;
};
struct ckpt_written ckpt_save_written(const struct ckpt_saver *saver);
/* Whether this rank would not have to wait in ckpt_save_advance. Not collective, and cheap. */
bool ckpt_save_ready(const struct ckpt_saver *saver);
/* Completes what this rank's thread does, and begins what comes next, if anything: else the save has ended, well or with
 * the error returned. Waits for the threads of all ranks. Collective. */
int ckpt_save_advance(struct ckpt_saver *saver);
/* Waits for the end of the save under way, if any, and returns how it ended. Collective. */
int ckpt_save_wait(struct ckpt_saver *saver);
/* Waits for this rank's thread alone; what is unfinished then, the next attempt removes. Not collective. */
void ckpt_saver_close(struct ckpt_saver *saver);

/* Finds the newest step folder in run_dir, of step `from` and those after it up to `upto` that are multiples of `every` (0:
 * none), whose manifest verifies (every file's size and checksum, the work shared among ranks), warning about each newer
 * one that does not and why. found is "" when there is none at all; ERR_DATA when there are some and none verifies. Collective. */
int ckpt_find_newest(struct comm *comm, const char *run_dir, int64_t from, int64_t upto, int64_t every,
                     char found[CKPT_PATH_MAX]);
/* The checkpoint that a person means by `path`: that folder, or the newest complete one of the run in it, which is said.
 * ERR_DATA when there is neither. Not collective. */
int ckpt_choose(const char *path, char folder[CKPT_PATH_MAX]);
/* Verifies one checkpoint folder: ERR_DATA naming the file, what is wrong and what to do. Collective. */
int ckpt_verify(struct comm *comm, const char *folder);
/* The path of the checkpoint's own tokenizer; "" when it has none, like those that earlier versions saved. */
int ckpt_tokenizer(const char *folder, char path[CKPT_PATH_MAX]);
/* Reads the metadata. Any one rank; not collective. */
int ckpt_read_meta(const char *folder, struct ckpt_meta *meta);
/* Fills each slab's data from the checkpoint. A tensor that is missing or of another shape is ERR_DATA naming both. The
 * caller has verified the folder. Not collective: each rank reads the slabs that it needs. */
int ckpt_load(const char *folder, const struct ckpt_slab *slabs, int n);
/* A copy with texts of its own, which ckpt_meta_free frees, also after a failure. */
int ckpt_meta_copy(struct ckpt_meta *to, const struct ckpt_meta *from);
void ckpt_meta_free(struct ckpt_meta *meta);

/* Prepares run_dir: creates it, checks that all ranks share it and that it can be written (ERR_SYSTEM), writes OWNER for
 * this attempt, removes temporary folders that earlier attempts left, and fills `run`. ERR_TAKEN while an attempt that is no
 * earlier one of this job lives there, unless the terms say otherwise; it may take a minute to learn whether it does, and
 * ERR_STOPPED when a rank is asked to stop meanwhile. Collective. */
struct ckpt_terms {
    bool takeover;            /* from an attempt that lives, too */
    bool (*stop_asked)(void); /* may be NULL */
};
int ckpt_open_run_dir(struct comm *comm, const char *run_dir, struct ckpt_terms terms, struct ckpt_run *run);
/* Says that this attempt has ended. A `run` of zeros is allowed. Not collective. */
void ckpt_close_run_dir(struct ckpt_run *run);
/* Whether a newer attempt has become the folder's owner: ckpt_check_owner then says which. Cheap; any one rank. */
bool ckpt_run_taken(const struct ckpt_run *run);
/* ERR_TAKEN when another attempt has become the owner of the run's folder. */
int ckpt_check_owner(const struct ckpt_run *run);

/* `tatara ckpt ls|show|verify|diff`. argv[0] is the verb after "ckpt". One rank. */
int ckpt_command(struct comm *comm, int argc, char **argv);

#endif
