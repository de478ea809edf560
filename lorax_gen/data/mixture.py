"""Batches drawn from several sources, as a pure function of (seed, step).

An epoch takes every sample of a source `weight` times (for the fractional part a random subset), in
an order seeded with [seed, epoch]; step s takes the s-th slice of the concatenated epochs. So a run
resumes by asking for its next step, and every host can compute any batch.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from lorax_gen.data.sources import Episode, Source
from lorax_gen.data.tasks import in_groups
from lorax_gen.data.tokens import Batch, Encoder, answer_batch, pad_rows
from lorax_gen.data.unseen import refuse_name, refuse_unseen
from lorax_gen.errors import UserError
from lorax_gen.prompts import surely_longer

ATTEMPTS = 100  # samples drawn to replace one that does not fit, before an error is raised
Rows = list[tuple[list[int], int]]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A tokenised episode."""

    task: str
    prompt: list[int]
    rows: Rows
    """For each question: token ids, and the index where the answer begins. Where its task has fewer
    questions than a prompt has rows, the others are an end of text, on which there is no loss."""
    source: str = ""
    """Name of its source."""


class Mixture:
    """Sources with weights, and the batches drawn from them.

    `counts` holds counts since construction, and `summary()` gives them in one line: shots and
    questions that a task does not have, shots left out because a prompt was too long, samples
    dropped because they were still too long, samples replaced because a batch would have held a
    single task. A dropped sample is replaced by another of its source. Asking for a step twice
    counts twice.

    Args:
      sources, weights: how often each source's samples are taken in an epoch.
      cloud_encoder: of the model that reads prompts; None: batches hold questions alone, and may be
        of a single task.
      prompts, queries: prompts of a batch, and questions under each.
      shots, min_shots: solved examples of a prompt, drawn between the two; None: always `shots`.
      prompt_length, question_length, answer_length: most tokens of a prompt, of a question with
        its answer, and of an answer with the end of text; None: as long as fits.
      full_sequence: the loss is on every token of a row, not only on the answer.
      buckets: lengths that prompts are padded to, in increasing order; a program is compiled for
        each.
      question_buckets: the same for questions.
      unseen: texts of unseen benchmarks; a source that contains one is refused.
      in_context: without a model that reads prompts, questions are after their prompts: rows have
        up to prompt_length + question_length tokens, and a bucket of each prompt bucket with
        question_length.
      groups: sources or tasks, as glob patterns, whose rows `group: [B]` marks in a batch; none: it
        is left out.

    Raises UserError where a source is, or contains, an unseen benchmark; where all sources together
    have a single task; and where a number is out of range.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        cloud_encoder: Encoder | None,
        edge_encoder: Encoder,
        *,
        seed: int,
        prompts: int,
        queries: int,
        shots: int,
        prompt_length: int,
        question_length: int,
        answer_length: int | None = None,
        full_sequence: bool = False,
        buckets: Sequence[int] = (),
        question_buckets: Sequence[int] = (),
        min_shots: int | None = None,
        unseen: Sequence[str] = (),
        in_context: bool = False,
        groups: Sequence[str] = (),
    ):
        self.sources, self.cloud, self.edge = tuple(sources), cloud_encoder, edge_encoder
        self.seed, self.prompts, self.queries = seed, prompts, queries
        self.full_sequence = full_sequence
        self.shots, self.min_shots = shots, shots if min_shots is None else min_shots
        self.question_length, self.answer_length = question_length, answer_length
        self.buckets = _checked_buckets("buckets", buckets, prompt_length)
        self.question_buckets = _checked_buckets(
            "question_buckets", question_buckets, question_length
        )
        self.in_context, self.groups = in_context and cloud_encoder is None, tuple(groups)
        if self.in_context:  # what a row holds beside the question
            self.question_buckets = tuple(size + question_length for size in self.buckets)
        self._check(weights, unseen)
        self.counts: Counter[str] = Counter()
        self.copies = [int(weight) for weight in weights]
        self.drawn = [
            round((weight - int(weight)) * len(source))
            for weight, source in zip(weights, self.sources, strict=True)
        ]
        self.samples_per_epoch = sum(
            copies * len(source) + drawn
            for copies, drawn, source in zip(self.copies, self.drawn, self.sources, strict=True)
        )
        if not self.samples_per_epoch:
            raise UserError("an epoch of the mixture holds no sample; raise the weights")
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def batch(self, step: int) -> Batch:
        """`prompt: [P, T]`, `prompt_lengths: [P]`, and `tokens` and `answer: [B, T]` of a step.

        Row b of the questions belongs to prompt b // Q. At least two prompts are of different
        tasks. Without a model that reads prompts there are `tokens` and `answer` alone.
        """
        samples = self.samples(step)
        rows, starts = zip(*(row for sample in samples for row in sample.rows), strict=True)
        questions = answer_batch(
            rows,
            starts,
            _smallest(self.question_buckets, max(map(len, rows))),
            self.edge.pad_id,
            self.full_sequence,
            self.answer_length,
        )
        if self.groups:
            names = [(sample.source, sample.task) for sample in samples for _ in sample.rows]
            marked = [any(in_groups(name, self.groups) for name in pair) for pair in names]
            questions["group"] = np.array(marked)
        if self.cloud is None:
            return questions
        prompts = [sample.prompt for sample in samples]
        length = _smallest(self.buckets, max(map(len, prompts)))
        return {
            "prompt": pad_rows(prompts, length, self.cloud.pad_id, "a prompt"),
            "prompt_lengths": np.array([len(prompt) for prompt in prompts], np.int32),
            **questions,
        }

    def samples(self, step: int) -> list[Sample]:
        """The samples of a step's batch, one for each prompt."""
        first = step * self.prompts
        samples = [self._sample(first + i) for i in range(self.prompts)]
        if self.cloud is not None and len({sample.task for sample in samples}) < 2:
            samples[-1] = self._of_another_task(samples[-1].task, first + self.prompts - 1)
        self.counts["samples"] += self.prompts
        return samples

    def summary(self) -> str:
        """One line of what was drawn, shortened, dropped and replaced."""
        c = self.counts
        return (
            f"{c['samples']:,} samples; {c['shots_missing']:,} shots and "
            f"{c['questions_missing']:,} questions that their tasks do not have; "
            f"{c['shots_left_out']:,} shots left out of "
            f"{c['prompts_shortened']:,} prompts that were too long; dropped for their length: "
            f"{c['dropped_prompts']:,} prompts, {c['dropped_questions']:,} questions, "
            f"{c['dropped_answers']:,} answers; {c['replaced_to_mix']:,} replaced to mix tasks"
        )

    # --- drawing ---

    def _draw_order(self, epoch: int) -> np.ndarray:
        """`[samples_per_epoch, 2]` int32: source and index of each sample of an epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        parts = []
        for i, source in enumerate(self.sources):
            some = rng.permutation(len(source))[: self.drawn[i]]
            taken = np.concatenate([np.tile(np.arange(len(source)), self.copies[i]), some])
            parts.append(np.stack([np.full(len(taken), i), taken], 1).astype(np.int32))
        order = np.concatenate(parts)
        return order[rng.permutation(len(order))]

    def _rng(self, position: int, purpose: int) -> np.random.Generator:
        # Never 0: with trailing zeros the seed would equal that of the epoch's order.
        epoch, offset = divmod(position, self.samples_per_epoch)
        return np.random.default_rng([self.seed, epoch, offset, purpose + 1])

    def _sample(self, position: int) -> Sample:
        """The sample at a position, or a replacement from its source where it does not fit."""
        epoch, offset = divmod(position, self.samples_per_epoch)
        which, index = self._order(epoch)[offset].tolist()
        return self._fitting(which, index, position, 0)

    def _fitting(self, which: int, index: int, position: int, purpose: int) -> Sample:
        source = self.sources[which]
        for attempt in range(ATTEMPTS):
            rng = self._rng(position, purpose + attempt)
            if attempt:
                index = int(rng.integers(len(source)))
            prompted = self.cloud is not None or self.in_context
            shots = int(rng.integers(self.min_shots, self.shots + 1)) if prompted else 0
            episode = source.episode(index, rng, shots, self.queries)
            sample = self._fit(episode)
            if sample is not None:
                self.counts["shots_missing"] += shots - len(episode.shots)
                self.counts["questions_missing"] += self.queries - len(episode.questions)
                return dataclasses.replace(sample, source=source.name)
        raise UserError(
            f"{ATTEMPTS} samples of {source.name} in a row are too long for prompt_length="
            f"{self.buckets[-1]}, question_length={self.question_length} and answer_length="
            f"{self.answer_length}; raise them or leave the source out"
        )

    def _of_another_task(self, task: str, position: int) -> Sample:
        """A sample of any source that is not of `task`."""
        for attempt in range(ATTEMPTS):
            purpose = ATTEMPTS * (attempt + 1)  # after those of the sample that it replaces
            rng = self._rng(position, purpose)
            which = attempt % len(self.sources)
            index = int(rng.integers(len(self.sources[which])))
            sample = self._fitting(which, index, position, purpose)
            if sample.task != task:
                self.counts["replaced_to_mix"] += 1
                return sample
        raise UserError(f"found nothing to mix with {task!r}; add a source")

    # --- fitting ---

    def _fit(self, episode: Episode) -> Sample | None:
        """The tokenised episode, with fewer shots if too long; None, counted, if still too long."""
        if not episode.prompt.strip():
            raise UserError(f"a prompt of {episode.task!r} is empty")
        if any(self._huge("".join(pair)) for pair in episode.questions):
            return self._dropped("question")
        rows = [self.edge.joined(*pair) for pair in episode.questions]
        rows += [([self.edge.end_of_text], 1)] * (self.queries - len(rows))
        if any(len(ids) > self.question_length for ids, _ in rows):
            return self._dropped("question")
        marked = [len(ids) - (1 if self.full_sequence else max(1, start)) for ids, start in rows]
        if self.answer_length is not None and max(marked) > self.answer_length:
            return self._dropped("answer")
        if self.cloud is None and not self.in_context:
            return Sample(episode.task, [], rows)
        found, left_out = self._prompted(episode, rows), 0
        while found is None and episode.shots:
            episode, left_out = episode.without_last_shot(), left_out + 1
            found = self._prompted(episode, rows)
        if found is None:
            return self._dropped("prompt")
        self.counts["shots_left_out"] += left_out
        self.counts["prompts_shortened"] += bool(left_out)
        return found

    def _prompted(self, episode: Episode, rows: Rows) -> Sample | None:
        """The sample with its prompt, which the cloud reads or each row begins with; None if that
        is longer than fits."""
        if self.cloud is not None:
            prompt = self._prompt(episode, self.cloud)
            return None if prompt is None else Sample(episode.task, prompt, rows)
        longest, asked = self.question_buckets[-1], len(episode.questions)
        texts = [(episode.join(episode, text), answer) for text, answer in episode.questions]
        if any(surely_longer("".join(pair), longest, self.edge.tokenizer) for pair in texts):
            return None
        joined = [self.edge.joined(*pair) for pair in texts]
        if any(len(ids) > longest for ids, _ in joined):
            return None
        return Sample(episode.task, [], joined + rows[asked:])

    def _prompt(self, episode: Episode, cloud: Encoder) -> list[int] | None:
        """The ids of a prompt; None if there are more than fit."""
        if surely_longer(episode.prompt, self.buckets[-1], cloud.tokenizer):
            return None
        ids = cloud.encode(episode.prompt)
        return ids if len(ids) <= self.buckets[-1] else None

    def _huge(self, question: str) -> bool:
        return surely_longer(question, self.question_length, self.edge.tokenizer)

    def _dropped(self, what: str) -> Sample | None:
        self.counts[f"dropped_{what}s"] += 1
        return None

    def _check(self, weights: Sequence[float], unseen: Sequence[str]) -> None:
        if len(weights) != len(self.sources):
            raise UserError(f"{len(self.sources)} sources but {len(weights)} weights")
        for source, weight in zip(self.sources, weights, strict=True):
            refuse_name(source.name)
            if not len(source):
                raise UserError(f"{source.name} holds no sample")
            if not 0 < weight < float("inf"):
                raise UserError(f"the weight of {source.name} is {weight}; it must be above 0")
            if unseen:
                refuse_unseen(source.texts(), unseen, source.name)
        if self.cloud is not None and sum(source.tasks for source in self.sources) < 2:
            names = ", ".join(source.name for source in self.sources) or "no source"
            raise UserError(
                f"the mixture holds a single task ({names}): the router's BatchNorm needs several "
                "in a batch; add a source"
            )
        if self.cloud is not None and (self.prompts < 2 or self.queries < 1):
            raise UserError(
                f"prompts={self.prompts} and queries={self.queries}: a batch needs two prompts or "
                "more, so that it mixes tasks, and a question each"
            )
        if not 0 <= self.min_shots <= self.shots:
            raise UserError(f"min_shots={self.min_shots} must lie between 0 and {self.shots}")


def _checked_buckets(name: str, buckets: Sequence[int], longest: int) -> tuple[int, ...]:
    """`buckets`, or a quarter, a half and all of `longest`; the last one must be `longest`."""
    if longest < 1:
        raise UserError(f"a length of {longest} tokens is too short; expected at least 1")
    found = tuple(buckets) or tuple(sorted({max(1, longest // 4), max(1, longest // 2), longest}))
    if list(found) != sorted(set(found)) or found[0] < 1 or found[-1] != longest:
        raise UserError(f"{name} {found} must increase from 1 or more to the longest, {longest}")
    return found


def _smallest(buckets: tuple[int, ...], size: int) -> int:
    return next(bucket for bucket in buckets if size <= bucket)
