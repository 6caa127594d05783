"""Papers transcribed in double precision: rules that measure a tensor first, or follow a second path.

Second points are held as the papers have them, as copies of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracles.normalised.reference_normalised import Reference

EPS = 1e-8


class INNAprop(Reference):
    """arXiv 2410.05871, with the published code's point psi; its decay is left out."""

    alpha, beta, sigma = 0.1, 0.9, 0.999

    def step(self, g: Tensor) -> Tensor:
        a, b, lr, g = self.alpha, self.beta, self.lr, g.double()
        if self.t == 0:
            self.psi, self.v = (1 - a * b) * self.w, torch.zeros_like(self.w)
        self.t += 1
        self.v = self.sigma * self.v + (1 - self.sigma) * g**2
        u = g / ((self.v / (1 - self.sigma**self.t)).sqrt() + EPS)
        self.psi = (1 - lr / b) * self.psi + lr * (1 / b - a) * self.w
        self.w = (1 + lr * (1 - a * b) / (b - lr)) * self.w - lr / (b - lr) * self.psi - lr * b * u
        return self.w.clone()


class ScheduleFree(Reference):
    """arXiv 2405.15682: y, where gradients are taken, the base z and the average x."""

    warmup, betas = 0, (0.9, 0.999)

    def step(self, g: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        g = g.double()
        if self.t == 0:
            self.x, self.z = self.w.clone(), self.w.clone()
            self.v, self.total = torch.zeros_like(self.w), 0.0
        self.t += 1
        lr = self.lr * (min(1.0, self.t / self.warmup) if self.warmup else 1.0)
        self.v = beta2 * self.v + (1 - beta2) * g**2
        u = g / ((self.v / (1 - beta2**self.t)).sqrt() + EPS)
        self.total += lr**2
        c = lr**2 / self.total
        self.z = self.z - lr * u
        self.x = (1 - c) * self.x + c * self.z
        self.w = (1 - beta1) * self.z + beta1 * self.x
        return self.w.clone()


class MARS(Reference):
    """arXiv 2411.10438 for AdamW, approximate; the gradient before the first is the first."""

    gamma, betas = 0.025, (0.95, 0.99)
    before: Tensor | None = None

    def direction(self, g: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        if self.before is None:
            self.before, self.m, self.v = g, torch.zeros_like(g), torch.zeros_like(g)
        c = g + self.gamma * beta1 / (1 - beta1) * (g - self.before)
        if c.norm() > 1:
            c = c / c.norm()
        self.before = g
        self.m = beta1 * self.m + (1 - beta1) * c
        self.v = beta2 * self.v + (1 - beta2) * c**2
        return self.m / (1 - beta1**self.t) / ((self.v / (1 - beta2**self.t)).sqrt() + EPS)


class FAdam(Reference):
    """arXiv 2405.12807 with p = 1/2, the decay decoupled."""

    betas, eps, eps2, clip = (0.9, 0.999), EPS, 0.01, 1.0

    def direction(self, g: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        if self.t == 1:
            self.m, self.f = torch.zeros_like(g), torch.zeros_like(g)
        share = beta2 * (1 - beta2 ** (self.t - 1)) / (1 - beta2**self.t)
        self.f = share * self.f + (1 - share) * g**2
        floor = min(self.eps, self.eps2 * float(g.square().mean().sqrt()))
        u = g / (self.f**0.5 + floor)
        u = u / max(1.0, float(u.square().mean().sqrt()) / self.clip)
        self.m = beta1 * self.m + (1 - beta1) * u
        return self.m


class Gravity(Reference):
    """arXiv 2101.09192, from rest."""

    beta = 0.9

    def direction(self, g: Tensor) -> Tensor:
        share = (self.beta * self.t + 1) / (self.t + 2)
        old = self.v if self.t > 1 else torch.zeros_like(g)
        self.v = share * old + (1 - share) * g / (1 + (g * g.abs().max()) ** 2)
        return self.v


class TAM(Reference):
    """arXiv 2412.18790."""

    beta, gamma, eps = 0.9, 0.9, EPS

    def torque(self, g: Tensor) -> float:
        if self.t == 1:
            self.m, self.s = torch.zeros_like(g), 0.0
        length = float(self.m.norm() * g.norm())
        self.s = self.gamma * self.s + (1 - self.gamma) * (
            float((self.m * g).sum()) / length if length else 0
        )
        return self.eps + (1 + self.s) / 2

    def direction(self, g: Tensor) -> Tensor:
        self.m = self.beta * self.m + self.torque(g) * g if self.t > 1 else self.torque(g) * g
        return self.m


class AdaTAM(TAM):
    """The adaptive form, with Adam's corrections."""

    def direction(self, g: Tensor) -> Tensor:
        torque, beta2 = self.torque(g), 0.999
        self.v = (beta2 * self.v if self.t > 1 else 0) + (1 - beta2) * g**2
        self.m = self.beta * self.m + (1 - self.beta) * torque * g
        return self.m / (1 - self.beta**self.t) / ((self.v / (1 - beta2**self.t)).sqrt() + EPS)


class CriticalAdam(Reference):
    """arXiv 2307.09638, a buffer of [priority, momentum]; what is squared is corrected.

    As published, nothing is done at first but to keep the gradient, and what is squared is not corrected.
    """

    betas, capacity, decay, published = (0.9, 0.999), 5, 0.7, False

    def direction(self, g: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        if self.t == 1:
            self.m, self.v = torch.zeros_like(g), torch.zeros_like(g)
            self.kept: list[list] = []
            if self.published:
                self.keep(g, g)
                return torch.zeros_like(g)
        self.m = beta1 * self.m + (1 - beta1) * g
        c = self.m + (torch.stack([m for _, m in self.kept]).mean(0) if self.kept else 0)
        self.keep(g, self.m)
        correction = 1 - beta1**self.t
        self.v = beta2 * self.v + (1 - beta2) * (c if self.published else c / correction) ** 2
        return c / correction / ((self.v / (1 - beta2**self.t)).sqrt() + EPS)

    def keep(self, g: Tensor, m: Tensor) -> None:
        norm = float(g.norm())
        if len(self.kept) < self.capacity:
            self.kept.append([norm, m])
        else:
            least = min(range(self.capacity), key=lambda i: self.kept[i][0])
            if norm > self.kept[least][0]:
                self.kept[least] = [norm, m]
        for entry in self.kept:
            entry[0] *= self.decay


class AdamP(Reference):
    """arXiv 2006.08217: rows first, then the whole tensor; the decay before the step."""

    betas, delta, wd_ratio = (0.9, 0.999), 0.1, 0.1
    fired: list[str]

    def step(self, g: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        g = g.double()
        if self.t == 0:
            self.m, self.v, self.fired = torch.zeros_like(g), torch.zeros_like(g), []
        self.t += 1
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        u = self.m / (1 - beta1**self.t) / ((self.v / (1 - beta2**self.t)).sqrt() + EPS)
        ratio = 1.0
        for word, shape in (("rows", self.w.shape), ("all", (1, -1))):
            a, w = g.reshape(shape), self.w.reshape(shape)
            if torch.cosine_similarity(a, w, dim=1).abs().max() < self.delta / w.shape[1] ** 0.5:
                n = w / (w.norm(dim=1, keepdim=True) + EPS)
                u = (u.reshape(shape) - n * (n * u.reshape(shape)).sum(1, keepdim=True)).reshape(self.w.shape)
                ratio = self.wd_ratio
                self.fired.append(word)
                break
        self.w = (1 - self.lr * self.weight_decay * ratio) * self.w - self.lr * u
        return self.w.clone()


class DoG(Reference):
    """arXiv 2302.12022 for one tensor, without the 1e-8 that published code adds to the first square."""

    reps_rel = 1e-6

    def step(self, g: Tensor) -> Tensor:
        g = g.double() + self.weight_decay * self.w
        if self.t == 0:
            self.first, self.r, self.s = self.w.clone(), self.reps_rel * (1 + self.w.norm()), 0.0
        self.t += 1
        self.r = max(self.r, (self.w - self.first).norm())
        self.s += g.norm() ** 2
        rate = self.lr * self.r / self.s**0.5
        self.w = self.w - rate * g
        return self.w.clone()
