"""Hugging Face Transformers with PyTorch: its own generate, as it is loaded by default."""

DISTRIBUTIONS = ("transformers", "torch", "numpy")


def start(request):
    import torch  # noqa: F401
    from transformers.models.gemma.modeling_gemma import GemmaForCausalLM  # noqa: F401


def load(request):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        request["checkpoint"], dtype=getattr(torch, request["dtype"])
    ).eval()
    device = request["device"]
    if device == "auto":  # as the backends choose
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(ids, new):
        rows = torch.from_numpy(ids).long().to(model.device)
        with torch.inference_mode():
            made = model.generate(
                input_ids=rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
            )
        return made[:, ids.shape[1] :].cpu().numpy()

    return generate
