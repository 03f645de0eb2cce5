"""LoRA-Pro: ``lorapro_full_adjustment`` of its DeepSpeed, beside our adjustment of gradients.

The code keeps AdamW's moments of the full gradient of W, and adjusts the factors' gradients of what
AdamW makes of it: ours is given that, and adjusts it. Its scale of 2 and damping of 1e-8 are
constants. Its first step, from B = 0, is another formula.
"""

from __future__ import annotations

from math import sqrt
from types import SimpleNamespace

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import M, N, R, Worst
from fedraclora.rng import generator, torch_normal
from fedraclora.training.extras.pairs import Pair, lora_pro

PATH = "DeepSpeed-0.15.1/deepspeed/runtime/zero/stage_1_and_2.py"
SCALE, DAMPING, BETAS, STEPS = 2.0, 1e-8, (0.9, 0.999), 4


def unused_by(source: bytes) -> list[str]:
    """List the modules of DeepSpeed that its file imports."""
    lines = [line.split() for line in source.decode().splitlines()]
    named = [words[1] for words in lines if len(words) > 1 and words[0] in {"from", "import"}]
    return sorted({name for name in named if name.split(".")[0] in {"deepspeed", "packaging"}})


def compare(code: Repository) -> Findings:
    """Compare both adjusted gradients in each step but the first."""
    rng, worst, pair = generator(0, "lora_pro"), Worst(), Pair("w", SCALE, {})
    with code.modules(
        PATH, root="DeepSpeed-0.15.1/deepspeed/runtime/zero", unused=unused_by(code.file(PATH))
    ) as [module]:
        held = SimpleNamespace(exp_avg={}, exp_avg_sq={}, global_step=0)
        for step in range(STEPS):
            A, B = torch_normal(rng, R, N).float(), torch_normal(rng, M, R).float()
            G = torch_normal(rng, M, N).float()
            gradients = [SCALE * B.mT @ G, SCALE * G @ A.mT]
            held.global_step = step
            held.params_in_partition, held.averaged_gradients = [[A, B]], [gradients]
            module.DeepSpeedZeroOptimizer.lorapro_full_adjustment(held, 0)
            if not step:
                continue
            done = [1 - beta ** (step + 1) for beta in BETAS]
            g = held.exp_avg[0] / done[0] / (held.exp_avg_sq[0].sqrt() / sqrt(done[1]) + 1e-8)
            values = {"w/B": B[None].double(), "w/A": A[None].double()}
            given = {"w/B": SCALE * g @ A.mT, "w/A": SCALE * B.mT @ g}
            given = {name: value[None].double() for name, value in given.items()}
            ours = lora_pro(pair, given, values, DAMPING)
            worst.add(A=(ours["w/A"][0], gradients[0]), B=(ours["w/B"][0], gradients[1]))
    return worst.found


CHECK = CodeCheck(
    "local.adjust=lora_pro",
    "mrflogs/LoRA-Pro",
    "fe26027",
    f"the adjusted gradients, {STEPS - 1} steps",
    compare,
)
