"""metrics.prom, read by Prometheus' own parser."""

from __future__ import annotations

import itertools
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from keepstep.run_folder.metrics import FIGURES, metrics_of, show_metrics
from keepstep.run_folder.progress import Reached
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from tests.project.documents import text_of

TIME = "2026-11-27T05:00:00.000+00:00"


def values(text: str) -> dict[str, float]:
    """Name (and kind) of each sample → its value."""
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))  # node_exporter refuses one that is there twice
    assert all(family.documentation for family in families)
    return {
        sample.name + sample.labels.get("kind", ""): sample.value
        for family in families
        for sample in family.samples
    }


def test_an_attempt_at_work_and_one_that_has_ended() -> None:
    figures = {"loss": 1.5, "tokens_per_second": 1e4, "grad_norm": float("nan")}
    reached = Reached(TIME, 2, 37, {"step": 30.5, "save": 1.0}, figures)
    found = values(metrics_of(reached, "mine", "ab12"))
    assert found["keepstep_up"] == 1
    assert found["keepstep_step"] == 37
    assert found["keepstep_attempt_seconds_totalstep"] == 30.5
    assert found["keepstep_loss"] == 1.5
    assert found["keepstep_progress_timestamp_seconds"] == 1795755600
    assert "keepstep_grad_norm" not in found
    ended = values(metrics_of(reached, "mine", "ab12", "failed", 70))
    assert (ended["keepstep_up"], ended["keepstep_exit_status"]) == (0, 70)


@given(
    st.text(),
    st.dictionaries(st.sampled_from(sorted(FIGURES)), st.floats()),
    st.integers(0, 10**15),
)
def test_whatever_a_run_is_called(name: str, figures: dict[str, float], step: int) -> None:
    text = metrics_of(Reached(TIME, 1, step, {"step": 1.0}, figures), name, "ab12")
    assert values(text)["keepstep_step"] == step
    (family, *_) = text_string_to_metric_families(text)
    assert family.samples[0].labels["run"] == name.encode(errors="backslashreplace").decode()


def test_a_reader_sees_one_or_the_other(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.private.mkdir()
    for text in ("a\n", "b\n"):
        show_metrics(run, Storage(), text)
        assert run.metrics.read_text() == text
    assert [path.name for path in run.private.iterdir()] == ["metrics.prom"]


def test_a_reader_in_a_loop_sees_whole_files_alone(tmp_path: Path) -> None:
    """Under load, as node_exporter reads it: each is one that was written, and parses."""
    run, storage, over = RunFolder(tmp_path), Storage(), threading.Event()
    run.private.mkdir()
    texts = [
        metrics_of(Reached(TIME, 1, step, {"step": 1.0}), "x" * 4000 * step, "ab12")
        for step in range(1, 4)
    ]
    show_metrics(run, storage, texts[0])

    def rewrite() -> None:
        for text in itertools.cycle(texts):
            show_metrics(run, storage, text)
            if over.is_set():
                return

    with ThreadPoolExecutor(2) as pool:
        writer = pool.submit(rewrite)
        try:
            seen: set[str] = set()
            while not writer.done() and len(seen) < len(texts):
                seen |= {run.metrics.read_text() for _ in range(200)}
        finally:
            over.set()
        writer.result()
    assert seen == set(texts)
    assert all(values(text)["keepstep_step"] == step for step, text in enumerate(texts, start=1))


def test_every_metric_is_on_the_page() -> None:
    reached = Reached(TIME, 1, 1, {"step": 1.0}, dict.fromkeys(FIGURES, 1.0))
    texts = metrics_of(reached, "a", "b"), metrics_of(reached, "a", "b", "finished", 0)
    names = {
        sample.name
        for text in texts
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert names == set(re.findall(r"`(keepstep_\w+)`", text_of("docs/sight.md")))
