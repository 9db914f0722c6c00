/* The arena: measuring and taking with the same calls. */
#include "arena.h"

#include "err.h"
#include "ops.h"

#define ARENA_ALIGN 128

struct arena arena_measure(struct device *dev)
{
    return (struct arena){.dev = dev};
}

int arena_open(struct arena *arena, struct device *dev, size_t bytes)
{
    void *base = NULL;
    *arena = (struct arena){.dev = dev};
    TRY(dev->table->alloc(dev, bytes, &base));
    arena->base = base;
    arena->size = bytes;
    return 0;
}

void arena_close(struct arena *arena)
{
    if (arena->base) arena->dev->table->free(arena->dev, arena->base, arena->size);
    *arena = (struct arena){.dev = arena->dev};
}

void *arena_take(struct arena *arena, enum arena_kind kind, size_t bytes)
{
    const size_t padded = (bytes + ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN;
    char *at = arena->base ? arena->base + arena->used : NULL;
    arena->used += padded;
    arena->by_kind[kind] += padded;
    ASSERT(!arena->base || arena->used <= arena->size);
    return at;
}

struct tensor arena_tensor(struct arena *arena, enum arena_kind kind, enum dtype dtype, int64_t rows, int64_t cols,
                           int64_t depth)
{
    struct tensor t = depth > 0  ? tensor_3d(NULL, dtype, rows, cols, depth)
                      : cols > 0 ? tensor_2d(NULL, dtype, rows, cols)
                                 : tensor_1d(NULL, dtype, rows);
    t.data = arena_take(arena, kind, tensor_bytes(t));
    return t;
}

const char *arena_kind_name(enum arena_kind kind)
{
    static const char *const names[] = {
#define X(name, text) text,
        ARENA_LIST(X)
#undef X
    };
    return names[kind];
}
