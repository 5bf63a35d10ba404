"""What may happen to a picture without changing what it shows, and what it is worth afterwards."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from leapalign.tiny.lessons import FADED, WHOLE
from leapalign.tiny.world import BACKGROUND, IMAGE_SIZE

NOISE = 0.1  # largest standard deviation of the pixel noise
DRIFT = 60.0  # squared distance (over an image in [0, 1]) that halves what a picture is worth
SHARED_RADIUS = 6.0  # longest perturbation shared by a batch; recolouring an object is about 9


def worth(images: Tensor, clean: Tensor) -> Tensor:
    """What is left of the grade ``(B,)`` of ``clean`` after a drift to ``images``, both ``(B, 3, H, W)``."""
    drift = 4 * F.avg_pool2d(images - clean, 2).square().sum(dim=(1, 2, 3))
    return torch.exp2(-drift / DRIFT)


def every_token(pattern: Tensor) -> Tensor:
    """The mean of ``pattern (1, 3, H, W)`` over the model's 4x4 patches, in all of them: what a bias can paint."""
    side = IMAGE_SIZE // 4
    mean = pattern.view(1, 3, side, 4, side, 4).mean(dim=(2, 4))
    return mean[:, :, None, :, None, :].expand(1, 3, side, 4, side, 4).reshape(1, 3, IMAGE_SIZE, IMAGE_SIZE)


def length(images: Tensor) -> Tensor:
    """L2 norms ``(B, 1, 1, 1)``."""
    return images.flatten(1).norm(dim=1).clamp(min=1e-9)[:, None, None, None]


class Disturbance:
    """Noise, tint, contrast and shared perturbations, growing to full ``strength`` (in [0, 1])."""

    def __init__(self, generator: torch.Generator) -> None:
        self.strength = 0.0
        self._generator = generator
        self._background = torch.tensor(BACKGROUND).view(1, 3, 1, 1)
        self._shared = torch.zeros(8, 3, IMAGE_SIZE, IMAGE_SIZE)
        self._current: int | None = None

    def tint(self, images: Tensor) -> Tensor:
        """Each with its own contrast, colour matrix, tint and smooth stain."""
        count, rand = len(images), self._rand
        spread = self.strength * rand(count, 1, 1, 1)
        contrast = 1 + 0.3 * spread * (2 * rand(count, 1, 1, 1) - 1)
        matrix = torch.eye(3) + 0.15 * spread[:, 0] * self._randn(count, 3, 3)
        stain = F.interpolate(self._randn(count, 3, 4, 4), size=IMAGE_SIZE, mode="bilinear")
        stain = 0.1 * self.strength * rand(count, 1, 1, 1) * stain + 0.1 * spread * self._randn(count, 3, 1, 1)
        colors = torch.einsum("bcd,bdhw->bchw", matrix, images - self._background)
        return self._background + contrast * colors + stain

    def apply(self, clean: Tensor) -> Tensor:
        """``clean``, laid out as in `Lesson`, disturbed; a faded picture as the one it came from."""
        tinted = self._generator.get_state()
        before = self.tint(clean[:FADED])
        self._generator.set_state(tinted)
        images = torch.cat([before, self.tint(clean[FADED : 2 * FADED]), self.tint(clean[2 * FADED :])])
        grain = NOISE * self._rand(FADED + WHOLE, 1, 1, 1) * self._randn(FADED + WHOLE, *clean.shape[1:])
        images = images + torch.cat([grain[:FADED], grain])
        self._current = (
            int(torch.randint(len(self._shared), (1,), generator=self._generator)) if self._rand(1) < 0.6 else None
        )
        if self._current is not None:
            images = images + self.strength * self._rand(1) * self._shared[self._current]
        return images.clamp(0, 1)

    def learn(self, gradient: Tensor) -> None:
        """Moves the shared perturbation just used towards what pleases the scorer, by its ``gradient``."""
        if self._current is None:
            return
        mean = gradient.mean(dim=0, keepdim=True)
        mean = every_token(mean) if self._current % 2 else mean
        moved = self._shared[self._current] + SHARED_RADIUS / 6 * (mean / length(mean))[0]
        moved = moved * (SHARED_RADIUS / moved.norm()).clamp(max=1)
        self._shared[self._current] = 0 if self._rand(1) < 0.02 else moved

    def along(self, gradient: Tensor) -> Tensor:
        """Steps of length 0.2 to 1, up or down each picture's ``gradient (B, 3, H, W)``."""
        sign = torch.where(self._rand(len(gradient), 1, 1, 1) < 0.5, -1.0, 1.0)
        return sign * self._rand(len(gradient), 1, 1, 1).clamp(min=0.2) * gradient / length(gradient)

    def together(self, gradient: Tensor, images: Tensor) -> Tensor:
        """One step for all pictures, of mean length 0.5 to 2: the mean gradient, that of the model's patches, or
        the colour matrix that pleases most."""
        kind = int(torch.randint(4, (1,), generator=self._generator))
        if kind >= 2:
            colors = images - self._background
            matrix = torch.einsum("bchw,bdhw->cd", gradient, colors)
            step = torch.einsum("cd,bdhw->bchw", matrix, colors)
        else:
            step = gradient.mean(dim=0, keepdim=True)
            step = (every_token(step) if kind else step).expand_as(images)
        sign = torch.where(self._rand(1) < 0.5, -1.0, 1.0)
        return sign * (0.5 + 1.5 * self._rand(1)) * step / length(step).mean()

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)
