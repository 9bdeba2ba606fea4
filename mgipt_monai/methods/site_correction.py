# SPDX-License-Identifier: Apache-2.0
"""Site correction: show the network its source's look instead of the site's, weighted by the evidence."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor, nn

from mgipt_monai.methods.base import Prediction
from mgipt_monai.methods.site_memory import Remembering, SiteMemory
from mgipt_monai.networks.alignment import AlignedNorms
from mgipt_monai.networks.alignment.layers import (
    MEASURE,
    find_norm_layers,
    has_stored_statistics,
    stored_statistics,
)
from mgipt_monai.networks.alignment.site import SiteNorms, SiteStatistics
from mgipt_monai.networks.alignment.site_rule import SiteRule, read_rule
from mgipt_monai.networks.alignment.source_statistics import SourceStatistics, read_statistics
from mgipt_monai.networks.alignment.windows import Output
from mgipt_monai.networks.ensemble import disagreement, disagreement_map, slabs
from mgipt_monai.networks.look import FEWEST_IMAGES, SiteLook
from mgipt_monai.networks.prompts.early_stop import Head, check_head
from mgipt_monai.utils.state_checks import check_keys, is_whole

__all__ = ["SiteCorrection"]

SLAB = 2**16
"""Number of a window's voxels whose views are compared at once."""
IMAGE_SHARE = 0.2
"""Weight of the image's own statistics in the third prediction."""
TRUST = 2.5
"""Trust in the evidence where no rule was learnt for the network."""
TRUST_OF_LOOK = 0.5
"""Trust in the evidence of a network without batch norm: the source keeps at least half of the weight."""


class SiteCorrection(Remembering):
    """Correction of what a site's images have in common, weighted by the evidence that it differs from the source.

    With batch norm the network normalises with statistics of the site (Eq. 6, with the site in the image's place). The
    logits of three predictions are fused: the source's, one corrected to the site (:class:`SiteStatistics`), and
    one corrected to the site and, with a small weight, to the image. The latter two share the weight
    ``min(1, (trust * evidence) ** 2)``; the source has the rest. The evidence measures how much of the images' distance
    from the source is due to the site, so a site similar to the source is predicted as without adaptation. There are no
    prompts and no gradients, and no weight changes. Cost: 3 F.

    Without batch norm, and with ``statistics``, the image is corrected: its tone and its lowest amplitudes, as far as
    the site's differ from the source's by more than source images do (:class:`SiteLook`). Two predictions are fused,
    the source's and that of the corrected image. The latter's weight is half of the evidence:
    ``min(1, trust * evidence)``. Cost: 2 F, or 1 F where there is nothing to correct.

    With ``refresh``, at a site that is settled only every n-th image is predicted like this and learnt from. The
    others are predicted once, at 1 F: the statistics move from the source's to the third prediction's by the weight.
    What is lost: the source's prediction has no part in theirs, and a slow change of the site is followed n times as
    slowly. An image that the memory finds elsewhere is learnt from at once.

    A rule learnt from the network's own labelled source images (:func:`learn_site_rule`) tells which part of the
    distance is content, and how far the evidence may be trusted.

    Keeps between images four averages per channel of each norm layer, over the latest images of a few sites: means and
    deviations of the features and their squares, without spatial information. Without batch norm these are averages of
    the 17 quantiles and the amplitudes of each image channel.

    Args:
        network: the source network, with batch norm that stores its statistics, or any other with ``statistics``.
        site: None uses :class:`SiteStatistics` with its defaults.
        memory: keeps the statistics of several sites apart, so that images from elsewhere do not spoil them:
            ``default``, a :class:`SiteMemory` with other settings, or None to average all images alike.
        rule: result of :func:`learn_site_rule`, or its file; None takes the images' distances whole.
        trust: reciprocal of the evidence at which the source's weight becomes 0, above 0; None is the rule's, or 2.5
            without one; without batch norm the factor of the evidence, 0.5 for None.
        image_share: weight of the image's own statistics in the third prediction, in [0, 1].
        statistics: of at least 10 source images, with their look, for a network without batch norm: a statistics file
            or its content, see :func:`measure_source_statistics`. They must belong to the network's weights. Not used
            with batch norm.
        refresh: number of images, from 2; None refreshes at each. It needs batch norm, and there are no uncertainty
            maps then. The first images of a site, as many as its averages are over, are all learnt from.
        aligned_layers: regular expression on the names of the norm layers to correct; None corrects all. Without batch
            norm they only tell sites apart.
        head: ``sigmoid`` (each channel a structure) or ``softmax`` (channel 0 is background), for the uncertainty.
        output: which of the network's outputs are its logits, see :class:`AdaptationMethod`.

    Raises:
        ValueError: at construction, for a setting out of range, a network without batch norm and without statistics,
            statistics without a look or of too few images, or a rule that lacks a norm layer; at the first image, for
            a rule or statistics of other weights.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        >>> method = SiteCorrection(network)
        >>> logits = method(torch.rand(1, 3, 32, 32))
        >>> method.last[0]["forwards"], 0 <= method.last[0]["evidence"] < 1
        (3, True)
    """

    takes_windows = True
    norms: SiteNorms
    _is_checked: bool
    _look: SiteLook | None

    def __init__(
        self,
        network: nn.Module,
        site: SiteStatistics | None = None,
        *,
        memory: SiteMemory | Literal["default"] | None = "default",
        rule: SiteRule | str | os.PathLike[str] | None = None,
        trust: float | None = None,
        image_share: float = IMAGE_SHARE,
        statistics: SourceStatistics | str | os.PathLike[str] | None = None,
        refresh: int | None = None,
        aligned_layers: str | None = None,
        head: Head = "sigmoid",
        output: Output | None = None,
    ) -> None:
        self.rule, self.statistics = read_rule(rule), None
        if not any(map(has_stored_statistics, network.modules())):
            self.statistics = read_statistics(statistics)
        if trust is None and self.statistics is not None:
            trust = TRUST_OF_LOOK
        if trust is None:
            trust = TRUST if self.rule is None else self.rule.trust
        if not 0 < trust < float("inf"):
            raise ValueError(f"trust must be above 0, got {trust}")
        if not 0 <= image_share <= 1:
            raise ValueError(f"image_share must be in [0, 1], got {image_share}")
        if refresh is not None and (not is_whole(refresh) or refresh < 2):
            raise ValueError(f"refresh must be a whole number of images from 2, or None, got {refresh}")
        if refresh is not None and self.statistics is not None:
            raise ValueError("refresh needs batch norm: without it the corrected image costs 2 F at most")
        check_head(head)
        self.refresh = refresh
        self.trust, self.image_share, self.aligned_layers, self.head = trust, image_share, aligned_layers, head
        super().__init__(network, memory, output)
        self.site = SiteStatistics() if site is None else site
        self.site.rule = self.rule

    @property
    def has_uncertainty(self) -> bool:
        """Whether each image is predicted in several views, which can disagree."""
        return self.refresh is None

    @torch.no_grad()
    def _adapt_and_predict(self, image: Tensor) -> Prediction:
        if self.rule is not None and not self._is_checked:  # not for each image, since it reads all of the weights
            self.rule.check(self.network)
            self._is_checked = True
        if self._look is not None:
            return self._correct_image(image, self._look)
        norms, site = self.norms, self.site
        norms.start(image)
        if self.refresh is not None:
            moved = self._visit(image)
            is_due = self.images_seen % self.refresh == 0 or not site.is_settled
            if not (is_due or moved or (self.memory is not None and self.memory.is_elsewhere)):
                return self._predict_settled(image)
        site.begin()
        source: Tensor | None = None
        if isinstance(self.route.inferer, SimpleInferer):
            with norms.signing():
                source = norms.predict(image)
        if self.refresh is None:
            self._visit(image)
        with norms.corrected_to(site, observe=True):
            if source is None:
                norms.look(image)
            else:
                corrected = norms.predict_windows(image, "calibrated")

        evidence = site.evidence
        weight = self._weight(evidence)
        if source is None:
            fused, source, uncertainty, mean = self._predict_windows(image, weight)
        else:
            views = torch.cat([source, corrected, self._own(image)])
            fused = _fuse(views, weight)
            uncertainty, mean = disagreement(views, self.head)
        site.end()
        record = {"evidence": evidence, "adapted_weight": weight, "disagreement": mean}
        refreshed = {} if self.refresh is None else {"refreshed": True}
        shown = uncertainty if self.has_uncertainty else None
        return Prediction(fused, {**record, **refreshed, **self._cost()}, shown, source)

    def _weight(self, evidence: float) -> float:
        return min(1.0, (self.trust * evidence) ** 2)

    def _predict_settled(self, image: Tensor) -> Prediction:
        """Predict an image once, with what is known of the site and its own share, and learn nothing."""
        evidence = self.norms.known_evidence(self.site)
        weight = self._weight(evidence)
        with self.norms.corrected_to(self.site, image_share=weight * self.image_share, strength=weight):
            logits = self.norms.predict(image, "calibrated" if weight else "source")
        record = {"evidence": evidence, "adapted_weight": weight, "refreshed": False}
        return Prediction(logits, {**record, **self._cost()})

    def _correct_image(self, image: Tensor, look: SiteLook) -> Prediction:
        """Predict an image as it is and with the source's look; both as a whole or in windows."""
        norms, site = self.norms, self.site
        norms.start(image)
        site.begin()
        with norms.signing() if isinstance(self.route.inferer, SimpleInferer) else nullcontext():
            source = norms.predict(image)
        self._visit(image)
        corrected, evidence = look.correct(image, site)
        weight = min(1.0, self.trust * evidence)
        views = torch.cat([source, source if corrected is image else norms.predict(corrected)])
        fused = torch.lerp(source, views[1:], weight)
        uncertainty, mean = disagreement(views, self.head)
        site.end()
        record = {"evidence": evidence, "adapted_weight": weight, "disagreement": mean}
        return Prediction(fused, {**record, **self._cost()}, uncertainty, source)

    def _predict_windows(self, image: Tensor, weight: float) -> tuple[Tensor, Tensor | None, Tensor, float]:
        """Predict an image in windows with what was learnt in some of them; each window goes through all views at once.

        So no view is held of the whole volume, except the source's if it is asked for. The uncertainty is blended like
        the logits; its mean counts each window's voxels.

        Returns:
            The fused logits, the source's or None, the uncertainty, and its mean.
        """
        sums: list[Tensor] = []

        def predict(windows: Tensor) -> Tensor:
            logits = self._views(windows).unflatten(0, (3, len(windows)))
            maps = []
            for one in logits.unbind(1):
                found = [disagreement_map(slab, self.head) for slab in slabs(one, SLAB)]
                maps.append(torch.cat([each for each, _ in found], dim=2))
                sums.extend(torch.stack([each[0, 0].mul(seen).sum(), seen.sum()]).double() for each, seen in found)
            kept = logits[: int(self.side_by_side)].unbind()
            return torch.cat([_fuse(logits, weight)[0], *kept, torch.cat(maps)], dim=1)

        with self.norms.attached():
            if not self.route.blends_all_channels:
                views = self.norms.run, self._site_only, self._own
                logits = torch.cat([cast(Tensor, self.route.inferer(image, view)) for view in views])
                return _fuse(logits, weight), logits[:1], *disagreement(logits, self.head)
            blended = cast(Tensor, self.route.inferer(image, predict))
        disagreeing, seen = torch.stack(sums).sum(dim=0).tolist()
        logits, uncertainty = blended[:, :-1], blended[:, -1:].clamp_(0, 1)
        fused, source = logits.chunk(2, dim=1) if self.side_by_side else (logits, None)
        return fused, source, uncertainty, disagreeing / max(seen, 1)

    def _views(self, images: Tensor) -> Tensor:
        """Return the logits of the three views, one after another."""
        if len(images) > 1:
            return torch.cat([self.norms.run(images), self._site_only(images), self._own(images)])
        # torch runs two small volumes much faster than one twice
        twice = torch.cat([images, images])
        with self.norms.corrected_to(self.site, image_share=(0.0, self.image_share)):
            return torch.cat([self.norms.run(images), self.norms.run(twice, "calibrated")])

    def _site_only(self, images: Tensor) -> Tensor:
        with self.norms.corrected_to(self.site):
            return self.norms.run(images, "calibrated")

    def _own(self, images: Tensor) -> Tensor:
        with self.norms.corrected_to(self.site, image_share=self.image_share):
            return self.norms.run(images, "calibrated")

    def predict_through(self, inferer: Inferer, windows: int = 2) -> None:
        """See :meth:`AdaptationMethod.predict_through`.

        Raises:
            ValueError: for a rule that was learnt from whole images or from other windows than the inferer's.
        """
        if self.rule is not None:
            self.rule.check_inferer(inferer)
        super().predict_through(inferer, windows)

    def settings(self) -> dict[str, Any]:
        """Return the settings, with the rule's digest: a run resumes with the same alone."""
        return {**super().settings(), **({} if self.rule is None else {"rule": self.rule.digest})}

    def source_norms(self) -> AlignedNorms:
        """Return the norm layers that are corrected."""
        return self.norms

    def _cost(self) -> dict[str, int]:
        return {"forwards": self.norms.forwards, "backwards": 0}

    def _bound(self) -> None:
        self._is_checked, self._look = False, None
        if self.statistics is not None:
            self._look = self._look_of(self.statistics)
        else:
            layers = find_norm_layers(self.network, self.aligned_layers)
            if self.rule is not None:
                self.rule.check_layers({name: len(stored_statistics(layer)[0]) for name, layer in layers.items()})
        self.norms = SiteNorms(self.network, self.aligned_layers, statistics=self.statistics, route=self.route)

    def _look_of(self, statistics: SourceStatistics) -> SiteLook:
        if self.rule is not None:
            raise ValueError(
                f"a rule of site correction needs batch norm, which {type(self.network).__name__} does not have: "
                "leave it out (in the bundle: rule_path)"
            )
        if statistics.look is None:
            raise ValueError(
                f"{statistics.origin} lacks the look of the source images, as files of earlier versions do and those "
                f"of images smaller than 5 pixels: measure them again with {MEASURE}"
            )
        if statistics.images < FEWEST_IMAGES:
            raise ValueError(
                f"{statistics.origin} is of {statistics.images} source images, too few to know what these vary in: "
                f"measure at least {FEWEST_IMAGES} with {MEASURE}"
            )
        return SiteLook(statistics.look)

    def _reset(self) -> None:
        super()._reset()
        self.site.reset()

    def _learnt(self) -> dict[str, Any]:
        return {"site": self.site.adaptation_state()}

    def _load_learnt(self, learnt: dict[str, Any]) -> None:
        check_keys("state", learnt, {"site"})
        if self._look is None:
            channels = {name: len(self.norms.stored(name)[0]) for name in self.norms.layers}
        else:
            channels = self._look.numbers
        self.site.load_adaptation_state(learnt["site"], channels)


def _fuse(views: Tensor, weight: float) -> Tensor:
    """Fuse the logits of the source, the site, and the site with the image, (3, ...) to (1, ...)."""
    source, corrected, own = views.split(1)
    return torch.lerp(source, (corrected + own) / 2, weight)
