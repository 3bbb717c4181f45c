"""Makes adalora.json: what the published code of AdaLoRA prunes and penalises, given these weights and gradients.

Source: github.com/QingruZhang/AdaLoRA at commit d10f5ebee16c478fa2f41a44a237b38e8c9b0338 (MIT), file
loralib/loralib/adalora.py. Nothing of it is copied here. Run it with a checkout of that commit:

    python tests/papers/golden/make_adalora.py path/to/AdaLoRA

The code takes |w · gradient| after the step. Here it is called with weights and gradients of the same moment, which is
what its paper says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

SITES, R, OUT, INN = 3, 4, 5, 6
PLAN = {"steps": 20, "warmup": 3, "final": 5, "interval": 2, "start": SITES * R, "end": 2 * SITES}


def rounded(tensor: torch.Tensor) -> list:
    """Six digits: enough, and exactly what the published code is then given."""
    return json.loads(json.dumps(tensor.tolist()), parse_float=lambda text: float(f"{float(text):.6g}"))


def main(checkout: str) -> None:
    sys.path.insert(0, str(Path(checkout) / "loralib"))
    from loralib import RankAllocator, SVDLinear, compute_orth_regu  # the published code

    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(*(SVDLinear(INN, OUT, r=R) for _ in range(SITES)))
    allocator = RankAllocator(
        model,
        lora_r=R,
        target_rank=2,
        init_warmup=PLAN["warmup"],
        final_warmup=PLAN["final"],
        mask_interval=PLAN["interval"],
        beta1=0.85,
        beta2=0.85,
        total_step=PLAN["steps"],
    )
    names = {"P": "lora_B", "lam": "lora_E", "Q": "lora_A"}

    def draw(name: str, scale: float) -> torch.Tensor:
        shape = {"P": (SITES, OUT, R), "lam": (SITES, R), "Q": (SITES, R, INN)}[name]
        return torch.tensor(rounded(scale * torch.randn(shape, generator=generator)))

    steps = []
    for t in range(1, PLAN["steps"] - PLAN["final"]):
        weights, gradients = ({name: draw(name, 0.3) for name in names} for _ in range(2))
        for i, site in enumerate(model):
            for name, theirs in names.items():
                parameter = site.get_parameter(theirs)
                parameter.data = weights[name][i].clone().view_as(parameter)
                parameter.grad = gradients[name][i].clone().view_as(parameter)
        budget, _ = allocator.update_and_mask(model, t)
        steps.append(
            {
                "weights": {name: rounded(value) for name, value in weights.items()},
                "gradients": {name: rounded(value) for name, value in gradients.items()},
                "budget": budget,
                "kept": [(site.lora_E.data.view(-1) != 0).tolist() for site in model],
            }
        )
    p, q = draw("P", 0.5), draw("Q", 0.5)
    for i, site in enumerate(model):
        site.lora_B.data, site.lora_A.data = p[i].clone(), q[i].clone()
    model.zero_grad()
    compute_orth_regu(model, regu_weight=0.5).backward()
    penalty = {
        "weight": 0.5,
        "P": rounded(p),
        "Q": rounded(q),
        "gradient_P": [site.lora_B.grad.tolist() for site in model],
        "gradient_Q": [site.lora_A.grad.tolist() for site in model],
    }
    path = Path(__file__).with_name("adalora.json")
    path.write_text(json.dumps({"allocation": {"plan": PLAN, "steps": steps}, "penalty": penalty}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
