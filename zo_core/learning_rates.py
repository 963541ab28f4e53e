"""Learning rates that are used when none is given."""

PAPER_LR = 1e-6
"""Middle of the paper's grid {1e-7, 5e-7, 1e-6, 5e-6}, used for every model but the demo."""
LORA_LR = 1e-4
"""MeZO's larger learning rate for LoRA and prefixes, used for every model but the demo."""
ADAMW_LR = 1e-5
DEMO_LR = {"full": 1e-5, "all-but": 1e-5, "sparse": 1e-5, "lora": 5e-3, "prefix": 1e-2}
DEMO_LAYER_LR = 5e-4
DEMO_ADAMW_LR = 1e-4


def recommended_lr(model: str, scope: str, optimizer: str = "zo-sgd") -> float:
    """Learning rate used when none is given.

    Measured for the demo model with zo-sgd: one layer (README, "Results"; it shows no full run).
    Looked at in one short run each (demo, reviews, batch 8, 100 steps, seed 0; the loss fell as for
    zo-sgd): ``momentum`` at a tenth, as it sums 1 / (1 - 0.9) steps; ``sign`` at ten times, as it
    moves entries by lr where zo-sgd moves them by ``lr |g z|`` with |g| of about 4; ``adamm`` at
    the same; ``mlp`` and ``channels`` as one layer; ``adamw`` on one layer. One layer's LoRA learns
    slowly at its rate and diverges at ten times that. Guesses to search around: every other scope,
    and for other models the middle of the paper's grid, MeZO's larger one for LoRA and prefix, and
    1e-5 for adamw.
    """
    form = scope.partition(":")[0]
    demo = model == "demo"
    if optimizer == "adamw":
        return DEMO_ADAMW_LR if demo else ADAMW_LR
    if demo:
        lr = DEMO_LR.get(form, DEMO_LAYER_LR)
    else:
        lr = LORA_LR if form in ("lora", "prefix") else PAPER_LR
    return lr * {"momentum": 0.1, "sign": 10}.get(optimizer, 1)
