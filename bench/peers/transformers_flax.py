"""Transformers 4, the last with Flax: generate as a whole in one jit, as its guide advises."""

DISTRIBUTIONS = ("transformers", "flax", "jax", "jaxlib", "numpy")


def start(request):
    from transformers import FlaxGemmaForCausalLM  # noqa: F401


def load(request):
    import jax
    import jax.numpy as jnp
    from transformers import FlaxGemmaForCausalLM

    dtype = jnp.dtype(request["dtype"])
    model = FlaxGemmaForCausalLM.from_pretrained(request["checkpoint"], dtype=dtype)
    # It keeps the parameters in the type of the file, which the conversion has chosen; but not all.
    model.params = jax.device_put(jax.tree.map(lambda x: x.astype(dtype), model.params))
    jax.block_until_ready(model.params)
    never = model.config.vocab_size + 7  # an id that no token has, so that no row stops
    programs = {}

    def generate(ids, new):
        key = (ids.shape, new)
        if key not in programs:
            programs[key] = jax.jit(
                lambda params, rows: (
                    model.generate(
                        rows,
                        attention_mask=jnp.ones_like(rows),
                        max_new_tokens=new,
                        do_sample=False,
                        eos_token_id=never,
                        pad_token_id=0,
                        params=params,
                    ).sequences
                )
            )
        made = programs[key](model.params, jnp.asarray(ids))
        return jax.device_get(made)[:, ids.shape[1] :]

    return generate
