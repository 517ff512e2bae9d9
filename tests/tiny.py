"""A network small enough to compare every step of a chain."""
import torch
from torch import nn

T, SHAPE = 50, (2, 3, 8, 8)


class Tiny(nn.Module):
    "A seeded network that uses xt and t; the attributes are the ones denoising-diffusion-pytorch asks for."
    channels = out_dim = 3
    random_or_learned_sinusoidal_cond = self_condition = False

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.layers = nn.Sequential(nn.Conv2d(4, 24, 3, padding=1), nn.SiLU(), nn.Conv2d(24, 3, 3, padding=1))

    def forward(self, x, timesteps, x_self_cond=None):
        assert timesteps.shape == x.shape[:1]
        time = (timesteps.to(x.dtype)/T)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return self.layers(torch.cat([x, time], dim=1))


def seeded_generator():
    return torch.Generator().manual_seed(11)


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)
