"""Google's gemma_pytorch: its own generate, given ids in the place of a tokenizer's."""

import json
from pathlib import Path

DISTRIBUTIONS = ("gemma", "torch", "numpy")
_FIELDS = (
    "vocab_size num_hidden_layers num_attention_heads num_key_value_heads hidden_size "
    "intermediate_size head_dim max_position_embeddings"
).split()


class Ids:
    """What generate needs of a tokenizer, for prompts that are lists of ids already."""

    pad_id, eos_id = 0, -1

    def __init__(self, *_):
        pass

    def encode(self, ids, **_):
        return list(ids)

    def decode(self, ids):
        return ids


def start(request):
    import gemma.model  # noqa: F401


def load(request):
    import gemma.model
    import gemma.tokenizer
    import torch
    from gemma.config import GemmaConfig

    gemma.tokenizer.Tokenizer = Ids
    folder = Path(request["checkpoint"])
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config = GemmaConfig(**{k: config[k] for k in _FIELDS}, dtype=request["dtype"])
    torch.set_default_dtype(config.get_dtype())
    model = gemma.model.GemmaForCausalLM(config)
    model.load_weights(str(next(folder.glob("*.ckpt"))))
    model.eval()
    torch.set_default_dtype(torch.float32)

    def generate(ids, new):
        return model.generate(ids.tolist(), "cpu", output_len=new, temperature=None)

    return generate
