# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""
MonteCLoRA: while training, factor A is a mean of noisy copies of itself, whose spread and weights are learned.

Sengupta et al., "Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank Adaptation",
2024, arXiv:2411.04358.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ....layers.new_tensors import draw_
from ....utils.warning import warn
from ..config import LoraConfig
from ..low_rank import LowRankLayer
from ..starts import Start
from .base import OfLinearLayers
from .registry import register_variant


class Draw(NamedTuple):
    """
    Random numbers of one forward pass.

    Attributes:
        normal: (samples,) for the weights of the samples.
        wishart: (r,) diagonal of a matrix from the Wishart distribution with r degrees of freedom.
    """

    normal: torch.Tensor
    wishart: torch.Tensor


class MontecloraSampler(nn.Module):
    """
    The distribution of noise on a factor A, and its last sample.

    Numbers are drawn when they are needed, by the generator of the device, so that a layer which is checkpointed draws
    the same again, and none are held in store.

    Args:
        in_features: columns of A.
        out_features: rows of A, the rank.
        num_samples: how many noisy copies there are.
        use_entropy: add sum(w^2) of the copies' weights w to the loss.
        dirichlet_prior: concentration that the weights are drawn to.
        sample_scaler: scale of the noise.
        kl_loss_weight: weight of the divergence from the prior.
        buffer_size: kept for callers of the released package, which draws so many samples ahead.
        device: where the tensors are made.
        dtype: type of the parameters and buffers.
        kwargs: kept for callers of the released package.

    Attributes:
        std_prior: (r,) logarithms of standard deviations, trained.
        expert_weights_prior: (samples,) logarithms of concentrations, trained.
        gaussian_var_prior: (r, r) the variances of the last sample, on the diagonal.
        expert_weights: (samples,) the weights of the last sample.

    Example:

        >>> from peft.tuners.lora.monteclora import MontecloraSampler
        >>> MontecloraSampler(6, 2, num_samples=4)().shape
        torch.Size([2, 6])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_samples: int,
        use_entropy: bool = True,
        dirichlet_prior: float = 1.0,
        sample_scaler: float = 3e-4,
        kl_loss_weight: float = 1e-5,
        buffer_size: int = 10,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.num_samples = in_features, out_features, num_samples
        self.use_entropy, self.dirichlet_prior, self.sample_scaler = use_entropy, dirichlet_prior, sample_scaler
        self.kl_loss_weight, self.buffer_size = kl_loss_weight, buffer_size
        self.last: Draw | None = None
        options = {"device": device, "dtype": dtype}
        self.std_prior = nn.Parameter(torch.rand(out_features, **options))
        self.expert_weights_prior = nn.Parameter(torch.rand(num_samples, **options))
        self.register_buffer("gaussian_var_prior", torch.eye(out_features, **options))
        self.register_buffer("expert_weights", torch.full((num_samples,), 1 / num_samples, **options))

    def forget(self) -> None:
        """Set the last sample to what it is before the first."""
        self.last = None
        self.gaussian_var_prior.copy_(torch.eye(self.out_features))
        self.expert_weights.fill_(1 / self.num_samples)

    # ------------------------------------------------------------------------------------------------------ sampling
    def draw(self) -> Draw:
        """Draw what a sample depends on; the diagonal of a Wishart matrix is one of sums of squares."""
        options = {"device": self.std_prior.device, "dtype": torch.float32}
        normal = torch.randn(self.num_samples, **options)
        wishart = torch.randn(self.out_features, self.out_features, **options).square().sum(0)
        return Draw(normal, wishart)

    def wishart_reparameterization(self, std: torch.Tensor, z_wishart: torch.Tensor) -> torch.Tensor:
        """
        Compute variances.

        Args:
            std: (r,) standard deviations.
            z_wishart: (r,) diagonal of a Wishart matrix.

        Returns:
            (r,), 0.001 at least.
        """
        return (std.square() * z_wishart).clamp(min=1e-3)

    def multivariate_reparameterization(self, z_mvn: torch.Tensor, cov_matrix: torch.Tensor) -> torch.Tensor:
        """
        Compute noise.

        Args:
            z_mvn: (..., in, r) standard normal numbers.
            cov_matrix: (r,) variances.
        """
        return self.sample_scaler * z_mvn * cov_matrix.sqrt()

    def dirichlet_reparameterization(self, alpha: torch.Tensor, z_dirichlet: torch.Tensor) -> torch.Tensor:
        """
        Compute weights of samples, by a normal approximation of the logarithms.

        Args:
            alpha: (samples,) concentrations.
            z_dirichlet: (samples,) standard normal numbers.

        Returns:
            (samples,), positive, with the sum 1.
        """
        alpha = alpha.clamp(min=1e-6)
        logarithms, count = alpha.log(), len(alpha)
        variance = (1 - 2 / count) / alpha + (1 / alpha).sum() / count**2
        spread = (variance.clamp(min=1e-6) + 1e-6).sqrt()
        return torch.softmax(logarithms - logarithms.mean() + spread * z_dirichlet, dim=0)

    def variances(self) -> torch.Tensor:
        """Compute the variances of the last sample, (r,), as a function of what is trained."""
        if self.last is None:
            return self.gaussian_var_prior.float().diagonal()
        return self.wishart_reparameterization(self.std_prior.float().exp(), self.last.wishart)

    def weights(self) -> torch.Tensor:
        """Compute the weights of the last sample, (samples,), likewise."""
        if self.last is None:
            return self.expert_weights.float()
        return self.dirichlet_reparameterization(self.expert_weights_prior.float().exp(), self.last.normal)

    def forward(self) -> torch.Tensor:
        """
        Sample noise for A; a sample with an entry that is not a number is left out, with a warning.

        Returns:
            (r, in) in float32, the weighted mean of the noise of all copies.
        """
        self.last = self.draw()
        shape = (self.num_samples, self.in_features, self.out_features)
        variances, weights = self.variances(), self.weights()
        mean = torch.tensordot(weights, torch.randn(shape, device=weights.device), 1)
        noise = self.multivariate_reparameterization(mean, variances).T
        if noise.isnan().any():
            warn(
                "the noise of MonteCLoRA has entries that are no numbers, so factor A is used without it; the "
                "training has diverged: lower the learning rate, or monteclora_config.sample_scaler"
            )
            return torch.zeros_like(noise)
        with torch.no_grad():
            self.gaussian_var_prior.copy_(variances.diag())
            self.expert_weights.copy_(weights)
        return noise

    # ------------------------------------------------------------------------------------------------------ the loss
    def dirichlet_kl(self, alpha2: torch.Tensor) -> torch.Tensor:
        """
        Compute the divergence of the weights' distribution from its prior.

        Args:
            alpha2: (samples,) concentrations of the prior.
        """
        alpha = self.expert_weights_prior.float().exp()
        total = alpha.sum()
        constants = total.lgamma() - alpha2.sum().lgamma() + (alpha.lgamma() - alpha2.lgamma()).sum()
        return constants + ((alpha - alpha2) * (alpha.digamma() - total.digamma())).sum()

    def wishart_kl(self, std: torch.Tensor) -> torch.Tensor:
        """
        Compute the divergence of the variances' distribution from its prior.

        Args:
            std: (r,) standard deviations.
        """
        rank, squares = self.out_features, std.square()
        return rank / 2 * (squares.sum() - squares.log().sum() - rank)

    def multivariate_kl(self, var: torch.Tensor) -> torch.Tensor:
        """
        Compute the divergence of the noise from standard normal noise.

        Args:
            var: (r,) variances of the last sample.
        """
        var = var.clamp(min=1e-6)
        return self.num_samples / 2 * (var.sum() - var.log().sum() - self.out_features)

    def get_variational_loss(self) -> torch.Tensor:
        """Compute what is added to the loss: the weighted divergences, and sum(w^2) if `use_entropy` asks for it."""
        prior = torch.full_like(self.expert_weights_prior, self.dirichlet_prior, dtype=torch.float32)
        divergence = self.dirichlet_kl(prior) + self.wishart_kl(self.std_prior.float().exp())
        loss = self.kl_loss_weight * (divergence + self.multivariate_kl(self.variances()))
        return loss + self.weights().square().sum() if self.use_entropy else loss


class BufferedMontecloraSampler:
    """
    Draws of a sampler, for callers of the released package; nothing is held in store here.

    Args:
        model: the sampler.
        buffer_size: has no effect.
        device: has no effect; numbers are drawn where the sampler's parameters are.
    """

    def __init__(
        self, model: MontecloraSampler, buffer_size: int = 150, device: torch.device | str | None = None
    ) -> None:
        self.model, self.buffer_size, self.device = model, buffer_size, device

    def get(self) -> Draw:
        """Draw once."""
        return self.model.draw()


@register_variant("monteclora_config")
class Monteclora(OfLinearLayers):
    """
    MonteCLoRA: W x + scaling * B (A + noise) x while training, and plain LoRA else.

    The delta and its merge are plain LoRA's. A layer that follows a tied one computes without noise.
    """

    name = "MonteCLoRA (monteclora_config)"
    has_room = False
    adds_delta = True

    def __init__(self, layer: LowRankLayer, adapter: str, config: LoraConfig) -> None:
        super().__init__(layer, adapter, config)
        self.settings = config.monteclora_config

    def make(self, layer: LowRankLayer, adapter: str, config: LoraConfig) -> None:
        """Make the sampler."""
        like = layer.new_parameter(1)
        rank, settings = layer.r[adapter], vars(self.settings)
        with torch.random.fork_rng(devices=[]):  # what is drawn is drawn by `start`
            sampler = MontecloraSampler(layer.in_features, rank, **settings, device=like.device, dtype=like.dtype)
        layer.container("lora_monteclora_sampler")[adapter] = sampler

    def start(self, layer: LowRankLayer, adapter: str, start: Start) -> None:
        """Start the factors, then the spread of the noise and the weights of the samples."""
        start.start(layer, adapter)
        sampler = layer.lora_monteclora_sampler[adapter]
        for parameter in (sampler.std_prior, sampler.expert_weights_prior):
            draw_(parameter, layer.stored_weight(), torch.Tensor.uniform_)
        sampler.forget()

    def delta_forward(self, layer: LowRankLayer, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Compute scaling * B (A + noise) x while training."""
        if not layer.training:
            return layer.delta_forward(adapter, x)
        a = layer.lora_A[adapter].weight
        noisy = a + layer.lora_monteclora_sampler[adapter]().to(a.dtype)
        hidden = F.linear(layer.prepared_input(adapter, x), noisy)
        return layer.output_of(adapter, hidden * layer.scaling[adapter])

    def penalty(self, layer: LowRankLayer, adapter: str) -> torch.Tensor | float:
        """
        Compute what the adapter adds to the loss while training.

        Args:
            layer: the layer.
            adapter: name.
        """
        return layer.lora_monteclora_sampler[adapter].get_variational_loss() if layer.training else 0.0
