"""The logits of a batch, walked through tile by tile: no matrix of all pairs is ever held."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Part = tuple[slice, slice, Tensor, Tensor | None]
"""Rows, columns, their logits, and where the two are duplicates (None if nowhere)."""


@dataclass(frozen=True)
class Sweep:
    """Logits of n images, the rows, and N captions, the columns.

    Attributes:
        images: float [n, dim].
        texts: float [N, dim]; those of a whole batch, of which the images may be a part.
        scale: float [].
        first: the column of row 0's own caption; row i's own is ``first + i``.
        mass: float [N], what each pair counts for; 1 on average.
        groups: int [N, k]; pairs that agree in any of k ≥ 1 columns are duplicates; None: none are.
        targets: float [N], ``mass`` over how many duplicates a pair has, itself counted, where they
            are its targets; None where they are left out instead.
        tile: rows and columns held at a time.
    """

    images: Tensor
    texts: Tensor
    scale: Tensor
    first: int
    mass: Tensor
    groups: Tensor | None
    targets: Tensor | None
    tile: int

    @property
    def own(self) -> slice:
        """The columns of the rows' own captions."""
        return slice(self.first, self.first + len(self.images))

    def normalisers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logarithms of the sums of exponentials of the logits, and what is counted as matched.

        Returns:
            of the rows, float [n]; of the columns, float [N]; the logits of each row's targets,
            each times its share, float [n]; the largest logit, float [].
        """
        rows = self.images.new_full((len(self.images),), -math.inf)
        columns = self.images.new_full((len(self.texts),), -math.inf)
        highest, matches = rows.new_full((), -math.inf), torch.zeros_like(rows)
        for i, j, logits, same in self._parts():
            if self.targets is not None and same is not None:
                matched = torch.where(same, logits, 0)
                to_text = self.targets[self.own][i] * matched.sum(dim=1)
                matches[i] += (to_text + matched @ self.targets[j]) / 2
            # One exponential serves rows and columns if both are measured from the tile's peak.
            peak = logits.max()
            highest = torch.maximum(highest, peak)
            exponentials = logits.sub_(peak).exp_()
            rows[i] = torch.logaddexp(rows[i], exponentials.sum(dim=1).log_() + peak)
            columns[j] = torch.logaddexp(columns[j], exponentials.sum(dim=0).log_() + peak)
        if not is_narrow(highest, rows, columns):
            rows, columns = self._careful_normalisers()
        if self.targets is None:
            products = (self.images * self.texts[self.own]).sum(dim=1)
            matches = self.mass[self.own] * (self.scale * products)
        return rows, columns, matches, highest

    def _careful_normalisers(self) -> tuple[Tensor, Tensor]:
        """The same for rows so far below the peak that their exponentials vanish beside it."""
        rows = self.images.new_full((len(self.images),), -math.inf)
        columns = self.images.new_full((len(self.texts),), -math.inf)
        for i, j, logits, _ in self._parts():
            rows[i] = torch.logaddexp(rows[i], logits.logsumexp(dim=1))
            columns[j] = torch.logaddexp(columns[j], logits.logsumexp(dim=0))
        return rows, columns

    def gradients(self, rows: Tensor, columns: Tensor, narrow: bool) -> tuple[Tensor, Tensor]:
        """Sums of the other side's vectors, each by its share less its target, both ways at once.

        Args:
            rows: the normalisers, float [n].
            columns: the normalisers, over the rows of all processes, float [N].
            narrow: whether one exponential a logit is enough everywhere.

        Returns:
            for the images, float [n, dim], and for all captions, float [N, dim].
        """
        of_images, of_texts = torch.zeros_like(self.images), torch.zeros_like(self.texts)
        mass = self.mass[self.own]
        for i, j, logits, same in self._parts():
            parts = _shares(logits, rows[i], columns[j], mass[i], self.mass[j], narrow)
            if self.targets is not None and same is not None:
                wanted = self.targets[self.own][i, None] + self.targets[None, j]
                parts -= wanted.masked_fill_(~same, 0)
            of_images[i].addmm_(parts, self.texts[j])
            of_texts[j].addmm_(parts.T, self.images[i])
        if self.targets is None:
            # The matches are counted once in each direction.
            of_images.addcmul_(mass[:, None], self.texts[self.own], value=-2)
            of_texts[self.own].addcmul_(mass[:, None], self.images, value=-2)
        return of_images, of_texts

    def _parts(self) -> Iterator[Part]:
        for row in range(0, len(self.images), self.tile):
            i = slice(row, row + self.tile)
            scaled = self.images[i] * self.scale
            for column in range(0, len(self.texts), self.tile):
                j = slice(column, column + self.tile)
                logits = scaled @ self.texts[j].T
                same = self._duplicates(i, j)
                if same is not None and self.targets is None:
                    same.diagonal(self.first + row - column).fill_(False)
                    logits.masked_fill_(same, -math.inf)
                yield i, j, logits, same

    def _duplicates(self, i: slice, j: slice) -> Tensor | None:
        """Where rows and columns are duplicates, themselves counted: bool [rows, columns]."""
        if self.groups is None:
            return None
        one, *more = self.groups.T
        same: Tensor = one[self.own][i, None] == one[None, j]
        for other in more:
            same |= other[self.own][i, None] == other[None, j]
        return same


def is_narrow(highest: Tensor, rows: Tensor, columns: Tensor) -> bool:
    """Whether the exponentials of all logits fit one float when measured from one level.

    Args:
        highest: the largest logit, float [].
        rows: the rows' normalisers, float [n].
        columns: the columns' normalisers, float [N].
    """
    # With a margin, for factors that multiply them. Asked once in a pass: on a GPU it waits.
    room = 0.8 * math.log(torch.finfo(rows.dtype).max)
    return bool(highest - torch.cat([rows, columns]).min() < room)


def _shares(
    logits: Tensor, rows: Tensor, columns: Tensor, of_rows: Tensor, of_columns: Tensor, narrow: bool
) -> Tensor:
    """Softmax along the rows plus softmax along the columns, each by its mass; overwrites."""
    if not narrow and not is_narrow(logits.max(), rows, columns):
        along_rows = (logits - rows[:, None]).exp_().mul_(of_rows[:, None])
        return along_rows.add_((logits - columns[None, :]).exp_().mul_(of_columns[None, :]))
    # exp(l − r) + exp(l − c) = exp(l − s) · (exp(s − r) + exp(s − c)): one exponential a logit.
    lowest = torch.minimum(rows.min(), columns.min())
    of_rows, of_columns = (lowest - rows).exp_() * of_rows, (lowest - columns).exp_() * of_columns
    return logits.sub_(lowest).exp_().mul_(of_rows[:, None] + of_columns[None, :])
