"""Ten steps of full fine-tuning in torch, float32: the batches of peft/clipped over the tied model, every weight
trained, weight decay of the matrices only, as transformers' Trainer groups parameters.

    python generate_full.py        after generate.py

Writes full/run.json: losses, gradient norms before clipping, and for each tensor the norm of its first gradient and of
its change over the ten steps.
"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
OPTIMIZER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0


def main():
    torch.manual_seed(0)
    steps = json.loads((HERE / "peft" / "clipped" / "run.json").read_text())["steps"]
    model = AutoModelForCausalLM.from_pretrained(HERE / "models" / "llama-tied", dtype=torch.float32)
    model.train()
    parameters = dict(model.named_parameters())
    start = {name: weight.detach().clone() for name, weight in parameters.items()}
    matrices = [weight for weight in parameters.values() if weight.dim() == 2]
    vectors = [weight for weight in parameters.values() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **OPTIMIZER)

    losses, norms, first = [], [], {}
    for step in steps:
        optimizer.zero_grad()
        losses.append(sum(backward(model, d, step["trained_tokens"]) for batch in step["micro_batches"] for d in batch))
        if not first:
            first = {name: weight.grad.norm().item() for name, weight in parameters.items()}
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_GRAD_NORM).item())
        optimizer.step()
    assert all(norm > MAX_GRAD_NORM for norm in norms), "clipping must act in every step"

    changes = {name: (weight.detach() - start[name]).norm().item() for name, weight in parameters.items()}
    record = {
        "optimizer": {"name": "AdamW", **OPTIMIZER, "weight_decay": WEIGHT_DECAY},
        "max_grad_norm": MAX_GRAD_NORM,
        "losses": losses,
        "grad_norms": norms,
        "first_gradients": first,
        "changes": changes,
    }
    (HERE / "full").mkdir(exist_ok=True)
    (HERE / "full" / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    print("losses", [round(loss, 4) for loss in losses], "norms", [round(norm, 2) for norm in norms])


def backward(model, document, trained_tokens):
    labels = torch.tensor(document["labels"])[1:]
    if not (labels >= 0).any():
        return 0.0
    logits = model(torch.tensor([document["input_ids"]])).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / trained_tokens
    loss.backward()
    return loss.item()


if __name__ == "__main__":
    main()
