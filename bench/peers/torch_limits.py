"""What this machine can do at most, by PyTorch: reading memory, and products in the dtype."""

import statistics

import torch

from gemma_hub.bench.numpy_limits import READ_BYTES, rates

DISTRIBUTIONS = ("torch", "numpy")


def limits(request):
    dtype = getattr(torch, request["dtype"])
    device = request["device"]
    if device == "auto":  # as the backends choose
        device = "cuda" if torch.cuda.is_available() else "cpu"

    def finished(result):
        if result.is_cuda:
            torch.cuda.synchronize()

    columns = 2048
    weight = torch.ones(READ_BYTES // (4 * columns), columns, device=device)
    vector = torch.ones(columns, device=device)
    read = rates(4 * weight.numel(), lambda: finished(torch.mv(weight, vector)))
    products = []
    for rows, inner, outer in ((512, 2048, 16384), (4096, 4096, 4096)):
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        right = torch.randn(outer, inner, device=device, dtype=dtype)
        products.append(
            rates(
                2 * rows * inner * outer,
                lambda a=left, b=right: finished(torch.nn.functional.linear(a, b)),
            )
        )
    return {"read_bytes_per_s": read, "matmul_flop_per_s": max(products, key=statistics.median)}
