"""The settings that say which data to read, and how much."""

import dataclasses
from typing import ClassVar, Literal

from pats_jax.core import files
from pats_jax.core.settings import Group, Range, at_least, setting
from pats_jax.data.columns import Columns, PairColumns
from pats_jax.errors import InputError, shown

OutOfDomainSet = Literal["mnli", "mnli_mm", "snli", "sick", "scitail", "rte"]


class OwnData(Group):
    """What programs on your own data have in common; the fields are those of the subclasses."""

    train_file: str | None
    validation_file: str | None
    test_file: str | None
    dataset_name: str | None
    dataset_config_name: str | None
    delimiter: str | None
    validation_split_percentage: float | None

    def check_sources(self) -> None:
        """Raises InputError if the data is named twice, or a flag has nothing that it is for."""
        if self.dataset_name and self.own_file:
            raise InputError("--dataset_name cannot be used with --train_file, --validation_file or --test_file")
        if self.dataset_config_name and not self.dataset_name:
            raise InputError("--dataset_config_name: needs --dataset_name")
        if self.delimiter is not None:
            if self.dataset_name:
                raise InputError("--delimiter: is for files; omit it with --dataset_name")
            if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
                raise InputError(f"--delimiter {shown(self.delimiter)}: must be one character, and no quote")

    @property
    def own_file(self) -> str | None:
        """The first of your own files, else None."""
        return self.train_file or self.validation_file or self.test_file

    @property
    def own_name(self) -> str | None:
        """The data of one's own: the name of a data set, or the first file."""
        return self.dataset_name or self.own_file


@dataclasses.dataclass(frozen=True)
class DataSettings(OwnData):
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
        "your data: CSV, TSV, JSON (lines or array) or parquet with sentence1[, sentence2], label",
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
    dataset_name: str | None = setting(
        None, "your data: a data set of the hub, or a folder with one; in place of files", is_path=True, is_basic=True
    )
    dataset_config_name: str | None = setting(None, "the configuration of dataset_name")
    text_column_names: list[str] | None = setting(
        None, "your data: the one or two columns of the texts; if unset, found by name", is_basic=True
    )
    label_column_name: list[str] | None = setting(
        None,
        "your data: the column of the labels, or of lists of labels, or a column of 0 and 1 for each label; if unset, "
        "label, gold_label or score",
        is_basic=True,
    )
    delimiter: str | None = setting(None, "your data: the character between the cells of CSV and TSV files")
    validation_split_percentage: float | None = setting(
        None,
        "your data: hold out so many percent of the training rows if there is no validation data",
        Range(lambda x: 0 < x < 100, "between 0 and 100"),
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
        if self.task_name and self.dataset_name:
            raise InputError("--dataset_name cannot be used with --task_name")
        if not self.task_name and not self.own_name:
            raise InputError("no data: set --task_name, or --train_file and --validation_file, or --dataset_name")
        self._check_own()

    def _check_own(self) -> None:
        """Checks what only your own data has."""
        if self.task_name:
            for name in ("text_column_names", "label_column_name", "delimiter", "dataset_config_name"):
                if getattr(self, name):
                    raise InputError(f"--{name}: --task_name {self.task_name} has its own; omit the flag")
        self.check_sources()
        if self.text_column_names is not None and len(self.text_column_names) not in (1, 2):
            raise InputError("--text_column_names: name one or two columns")
        if self.label_column_name is not None and not self.label_column_name:
            raise InputError("--label_column_name: name a column")
        names = [*(self.text_column_names or ()), *(self.label_column_name or ())]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise InputError(f"--text_column_names, --label_column_name: {shown(twice)} is named twice")

    @property
    def columns(self) -> Columns:
        """The columns of one's own data."""
        return Columns(tuple(self.text_column_names or ()), tuple(self.label_column_name or ()), self.delimiter)


@dataclasses.dataclass(frozen=True)
class PairDataSettings(OwnData):
    """Files or a data set of sources and targets."""

    title: ClassVar[str] = "data"

    train_file: str | None = setting(
        None, "your data: CSV, TSV, JSON (lines or array) or parquet with source, target", is_path=True, is_basic=True
    )
    validation_file: str | None = setting(
        None, "your validation data, in the same form as train_file", is_path=True, is_basic=True
    )
    test_file: str | None = setting(
        None,
        "your test data, as train_file, the targets optional, or .txt with one source per line",
        is_path=True,
        is_basic=True,
    )
    dataset_name: str | None = setting(
        None, "your data: a data set of the hub, or a folder with one; in place of files", is_path=True, is_basic=True
    )
    dataset_config_name: str | None = setting(None, "the configuration of dataset_name")
    source_column: str | None = setting(
        None, "the column of the sources; if unset, found by name, together with target_column", is_basic=True
    )
    target_column: str | None = setting(None, "the column of the targets", is_basic=True)
    text_column: str | None = setting(None, "another name of source_column")
    summary_column: str | None = setting(None, "another name of target_column")
    delimiter: str | None = setting(None, "the character between the cells of CSV and TSV files")
    validation_split_percentage: float | None = setting(
        10.0,
        "hold out so many percent of the training rows if there is no validation data",
        Range(lambda x: 0 < x < 100, "between 0 and 100"),
    )
    max_train_samples: int | None = setting(None, "train on the first N rows only", at_least(1))
    max_eval_samples: int | None = setting(None, "evaluate on the first N rows only", at_least(1))
    max_predict_samples: int | None = setting(None, "predict the first N rows only", at_least(1))

    def check(self) -> None:
        super().check()
        if not self.own_name:
            raise InputError("no data: set --train_file or --dataset_name")
        self.check_sources()
        for one, other in (("source_column", "text_column"), ("target_column", "summary_column")):
            if getattr(self, one) and getattr(self, other):
                raise InputError(f"--{one} and --{other} are two names of one flag; set one of them")
        source, target = self.columns.source, self.columns.target
        if (source is None) != (target is None):
            missing, given = ("source", "target") if source is None else ("target", "source")
            raise InputError(f"--{missing}_column is missing; name it too, or omit --{given}_column")
        if source is not None and source == target:
            raise InputError(f"--source_column, --target_column: {shown(source)} is named twice")

    @property
    def columns(self) -> PairColumns:
        """The columns of sources and targets."""
        return PairColumns(
            self.source_column or self.text_column, self.target_column or self.summary_column, self.delimiter
        )


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
