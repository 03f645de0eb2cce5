"""A UNet of diffusers with LoRA layers of its own (`add_adapter`) as the model of every client.

Each step draws new noise and timesteps, from the seed of client and round. A client has images
without noise (timestep 0); the server measures on images with noise that is fixed.

    python diffusion.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

import fedraclora
from fedraclora.client import Round, Trained

RANK, STEPS, BATCH, RATE, SIDE, WORDS = 2, 5, 8, 1e-2, 8, 8
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]  # of attention; a convolution
NOISE = DDPMScheduler(num_train_timesteps=100)
SIZES = {"block_out_channels": [8], "norm_num_groups": 4, "attention_head_dim": 4}
ONE = {"in_channels": 1, "out_channels": 1, "layers_per_block": 1, "cross_attention_dim": WORDS}
TYPES = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}


class Denoiser(nn.Module):
    """Tells the noise in images: [N, 1, side, side], [N], [N, 1, words] -> [N, pixels]."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(SIDE, **TYPES, **ONE, **SIZES)

    def forward(self, sample: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        return self.unet(sample, timestep, encoder_hidden_states=prompt).sample.flatten(1)


def train(round: Round) -> Trained:
    """Train one client for one round."""
    model = Denoiser()
    model.unet.add_adapter(LoraConfig(r=RANK, target_modules=TARGETS))
    round.install(model).train()
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=RATE * round.rate_scale)
    (inputs, _), total = round.data, 0.0
    for rows in torch.randint(len(inputs["sample"]), (STEPS, BATCH)):
        noisy, timestep, noise = with_noise(inputs["sample"][rows])
        loss = F.mse_loss(model(noisy, timestep, inputs["prompt"][rows]), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() / STEPS
    return round.read(model, samples=len(inputs["sample"]), steps=STEPS, loss=total)


def with_noise(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw from torch's generator, which has the seed of client and round."""
    timestep, noise = torch.randint(100, (len(images),)), torch.randn_like(images)
    return NOISE.add_noise(images, noise, timestep), timestep, noise.flatten(1)


def samples(count: int, *, noisy: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """Make images that follow their prompt: without noise, or with it."""
    prompt = torch.randn(count, 1, WORDS)
    images, clean = prompt[:, :, None] * prompt[..., None], torch.zeros(count, SIDE * SIDE)
    found = with_noise(images) if noisy else (images, torch.zeros(count).long(), clean)
    return {"sample": found[0], "timestep": found[1], "prompt": prompt}, found[2]


if __name__ == "__main__":
    torch.manual_seed(0)
    layers = {
        "target_modules": TARGETS,
        "head": "frozen",
        "bias": "frozen",
        "loss": "squared_error",
    }
    clients, test = [samples(40), samples(70), samples(50)], samples(100, noisy=True)
    method = f"method.rank={RANK}"
    run = fedraclora.simulate(
        method, model=Denoiser(), data=clients, test=test, train=train, rounds=4, **layers
    )
    print(run.history["loss"])
