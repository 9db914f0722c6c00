/* What differs between the C interfaces of oneDNN 2 and 3: how a matmul is described. */
#ifndef TATARA_CPU_DNNL_VERSION_H
#define TATARA_CPU_DNNL_VERSION_H

#include <oneapi/dnnl/dnnl.h>

/* C = A·B, C in f32, A and B of `type`, B's layout b_tag; dims of A, B, C. */
struct dnnl_matmul {
    dnnl_dims_t a, b, c;
    dnnl_data_type_t type;
    dnnl_format_tag_t b_tag;
};

#if DNNL_VERSION_MAJOR >= 3

static inline dnnl_status_t describe_matmul(dnnl_primitive_desc_t *pd, dnnl_engine_t engine,
                                            const struct dnnl_matmul *p, dnnl_primitive_attr_t attr)
{
    dnnl_memory_desc_t a = NULL, b = NULL, c = NULL;
    dnnl_status_t status = dnnl_memory_desc_create_with_tag(&a, 2, p->a, p->type, dnnl_ab);
    if (status == dnnl_success) status = dnnl_memory_desc_create_with_tag(&b, 2, p->b, p->type, p->b_tag);
    if (status == dnnl_success) status = dnnl_memory_desc_create_with_tag(&c, 2, p->c, dnnl_f32, dnnl_ab);
    if (status == dnnl_success) status = dnnl_matmul_primitive_desc_create(pd, engine, a, b, NULL, c, attr);
    if (a) dnnl_memory_desc_destroy(a);
    if (b) dnnl_memory_desc_destroy(b);
    if (c) dnnl_memory_desc_destroy(c);
    return status;
}

static inline dnnl_status_t append_sum(dnnl_post_ops_t post)
{
    return dnnl_post_ops_append_sum(post, 1.0F, 0, dnnl_data_type_undef);
}

#else

static inline dnnl_status_t describe_matmul(dnnl_primitive_desc_t *pd, dnnl_engine_t engine,
                                            const struct dnnl_matmul *p, dnnl_primitive_attr_t attr)
{
    dnnl_memory_desc_t a, b, c;
    dnnl_matmul_desc_t op;
    dnnl_status_t status = dnnl_memory_desc_init_by_tag(&a, 2, p->a, p->type, dnnl_ab);
    if (status == dnnl_success) status = dnnl_memory_desc_init_by_tag(&b, 2, p->b, p->type, p->b_tag);
    if (status == dnnl_success) status = dnnl_memory_desc_init_by_tag(&c, 2, p->c, dnnl_f32, dnnl_ab);
    if (status == dnnl_success) status = dnnl_matmul_desc_init(&op, &a, &b, NULL, &c);
    return status == dnnl_success ? dnnl_primitive_desc_create(pd, &op, attr, engine, NULL) : status;
}

static inline dnnl_status_t append_sum(dnnl_post_ops_t post)
{
    return dnnl_post_ops_append_sum(post, 1.0F);
}

#endif
#endif
