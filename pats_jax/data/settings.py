"""The settings that say which data to read, and how much."""

import dataclasses
from typing import ClassVar, Literal

from pats_jax.core import files
from pats_jax.core.settings import Group, at_least, setting
from pats_jax.errors import InputError

OutOfDomainSet = Literal["mnli", "mnli_mm", "snli", "sick", "scitail", "rte"]


@dataclasses.dataclass(frozen=True)
class DataSettings(Group):
    """A GLUE task, or your own files."""

    title: ClassVar[str] = "data"

    task_name: str | None = setting(
        None, "cola sst2 mrpc stsb qqp mnli qnli rte wnli; for your own data use --train_file", is_basic=True
    )
    data_dir: str | None = setting(
        None,
        'folder of GLUE\'s TSV files, or "builtin" for generated data; if unset, the hub',
        is_path=True,
        is_basic=True,
    )
    train_file: str | None = setting(
        None,
        "your data: CSV, TSV or JSON (lines or array) with sentence1[, sentence2], label",
        is_path=True,
        is_basic=True,
    )
    validation_file: str | None = setting(
        None, "your validation data, in the same form as train_file", is_path=True, is_basic=True
    )
    test_file: str | None = setting(
        None,
        "your test data, as train_file, or .txt with one text per line; labels are ignored",
        is_path=True,
    )
    do_regression: bool | None = setting(
        None, "your data: whether labels are scores (true) or classes (false); if unset, detected"
    )
    out_of_domain: list[OutOfDomainSet] | None = setting(None, "also score the final model on these sets")
    out_of_domain_dir: str | None = setting(
        None, "folder of the published SNLI, SICK and SciTail files; if unset, the hub", is_path=True
    )
    max_train_samples: int | None = setting(None, "train on the first N rows only", at_least(1))
    low_resource: int | None = setting(
        None, "train on N random rows, in which each label keeps its proportion", at_least(1)
    )
    max_eval_samples: int | None = setting(None, "evaluate on the first N rows only", at_least(1))
    max_predict_samples: int | None = setting(None, "predict the first N rows only", at_least(1))

    def check(self) -> None:
        super().check()
        if self.task_name:
            files.checked_name(self.task_name, "--task_name")  # it becomes part of the folder's name
        if self.low_resource and self.max_train_samples:
            raise InputError("--low_resource and --max_train_samples cannot be used together")
        for name in self.out_of_domain or ():
            if name.removesuffix("_mm") == (self.task_name or "").lower():
                raise InputError(f"--out_of_domain {name}: is the set of --task_name itself; choose another")
        if self.task_name and self.own_file:
            raise InputError("--task_name cannot be used with --train_file, --validation_file or --test_file")
        if not self.task_name and not self.own_file:
            raise InputError("no data: set --task_name, or --train_file and --validation_file")

    @property
    def own_file(self) -> str | None:
        """The first of your own files, else None."""
        return self.train_file or self.validation_file or self.test_file


@dataclasses.dataclass(frozen=True)
class GymDataSettings(Group):
    """A few-shot gym and its partition."""

    title: ClassVar[str] = "data"

    data_dir: str = setting(
        "builtin", 'folder of few-shot tasks, or "builtin" for generated ones', is_path=True, is_basic=True
    )
    partition: str = setting(
        "builtin",
        "builtin, metaicl or a JSON file with train (upstream), dev and test (target) lists",
        is_path=True,
        is_basic=True,
    )
    share_sources: bool = setting(False, "allow lists of a partition to contain tasks built from the same dataset")
    shots: int = setting(16, "shots, as in the names of the task files", at_least(1))
