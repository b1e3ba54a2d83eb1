"""llama.cpp, by the C interface that llama-cpp-python binds: greedy, without its tokenizer."""

import os

import numpy as np

DISTRIBUTIONS = ("llama-cpp-python", "numpy")


def start(request):
    import llama_cpp

    llama_cpp.llama_backend_init()


def load(request):
    import llama_cpp as c

    model = c.llama_model_load_from_file(
        request["checkpoint"].encode(), c.llama_model_default_params()
    )
    if not model:
        raise ValueError(f"llama.cpp cannot read {request['checkpoint']}")
    size = request["vocab_size"]

    def generate(ids, new):
        rows, length = ids.shape
        params = c.llama_context_default_params()
        params.n_ctx = params.n_batch = rows * (length + new)
        params.n_seq_max = rows
        params.n_threads = params.n_threads_batch = os.cpu_count()
        context = c.llama_init_from_model(model, params)
        made = np.zeros((rows, new), np.int32)
        batch = c.llama_batch_init(rows * length, 0, rows)
        tokens = ids
        for step in range(new):
            start = 0 if step == 0 else length + step - 1
            last = _fill(batch, tokens, start)
            if c.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            for row, place in enumerate(last):
                logits = np.ctypeslib.as_array(c.llama_get_logits_ith(context, place), (size,))
                made[row, step] = logits.argmax()
            tokens = made[:, step : step + 1]
        c.llama_batch_free(batch)
        c.llama_free(context)
        return made

    return generate


def _fill(batch, tokens, start):
    """Put (rows, T) tokens into a batch from position `start`; where each row's last one is."""
    rows, length = tokens.shape
    batch.n_tokens = rows * length
    for row in range(rows):
        for i in range(length):
            place = row * length + i
            batch.token[place] = int(tokens[row, i])
            batch.pos[place] = start + i
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = row
            batch.logits[place] = i == length - 1
    return [row * length + length - 1 for row in range(rows)]
