"""Makes `adamw_8bit/`: four steps of bitsandbytes' AdamW with 8-bit moments, on the CPU.

One parameter of 8 x 512 values, the fewest that bitsandbytes keeps in 8 bits, and gradients with long tails. Written are
the gradients, and after each step the parameter, the codes of both moments and the scales of their blocks.

    pip install torch==2.15.0 bitsandbytes==0.50.2 safetensors
    python generate_adamw_8bit.py
"""

from pathlib import Path

import bitsandbytes as bnb
import torch
from safetensors.torch import save_file

STEPS = 4
OUT = Path(__file__).parent / "adamw_8bit" / "run.safetensors"


def main():
    torch.manual_seed(7)
    parameter = torch.nn.Parameter(torch.randn(8, 512))
    optimizer = bnb.optim.AdamW8bit([parameter], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    tensors = {"start": parameter.detach().clone()}
    for step in range(1, STEPS + 1):
        gradient = (torch.randn(8, 512) ** 3 * 1e-3).bfloat16()
        tensors[f"{step}.gradient"] = gradient
        parameter.grad = gradient.float()
        optimizer.step()
        state = optimizer.state[parameter]
        tensors[f"{step}.parameter"] = parameter.detach().clone()
        for name in ["state1", "state2", "absmax1", "absmax2"]:
            tensors[f"{step}.{name}"] = state[name].clone()
    tensors["levels1"], tensors["levels2"] = state["qmap1"].clone(), state["qmap2"].clone()
    OUT.parent.mkdir(exist_ok=True)
    save_file(tensors, OUT)


if __name__ == "__main__":
    main()
