"""Fixtures shared by all tests."""
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
import warnings

import numpy as np
import pytest
import torch

from tiny import SHAPE, Tiny


def stub(name):
    "An empty module under this name, for an import that the oracle makes but never uses here."
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules[name] = module
    return module


def fill_vision(transforms, utils):
    "What the oracle's Trainer needs of torchvision, for pictures that have the right size already and are not mirrored."
    def compose(steps):
        def run(x):
            for step in steps: x = step(x)
            return x
        return run
    same = lambda *args: lambda x: x
    transforms.Compose, transforms.Lambda = compose, lambda f: f
    transforms.Resize = transforms.CenterCrop = transforms.RandomHorizontalFlip = same
    transforms.ToTensor = lambda: lambda image: torch.from_numpy(np.array(image)).movedim(-1, 0)/255  # (H,W,C) -> (C,H,W)
    utils.save_image = lambda *args, **options: None


def import_lucidrains():
    """denoising-diffusion-pytorch 1.10.12, the independent oracle.

    It imports torchvision and pytorch_fid for image files and FID. Where they are missing a module stands in that can
    do no more than read the tests' own pictures. Diffusers is imported first: it looks for torchvision by itself."""
    importlib.import_module("diffusers")
    if importlib.util.find_spec("torchvision") is None:
        vision = stub("torchvision")
        vision.transforms, vision.utils = stub("torchvision.transforms"), stub("torchvision.utils")
        fill_vision(vision.transforms, vision.utils)
    if importlib.util.find_spec("pytorch_fid") is None:
        stub("pytorch_fid")
        stub("pytorch_fid.fid_score").calculate_frechet_distance = None
        stub("pytorch_fid.inception").InceptionV3 = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch")


@pytest.fixture(scope="session")
def lucidrains():
    "The oracle; where it is not installed its tests are skipped, but never in CI."
    if importlib.util.find_spec("denoising_diffusion_pytorch") is None and not os.environ.get("CI"):
        pytest.skip("pip install --no-deps denoising-diffusion-pytorch==1.10.12")
    return import_lucidrains()


@pytest.fixture(scope="session")
def tiny():
    return Tiny().eval().requires_grad_(False)


@pytest.fixture
def start():
    "Pure noise for `tiny`."
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def seeded():
    "Every test starts from the same randomness."
    torch.manual_seed(0)
