"""Commands that are typed wrong, or given what they cannot use."""

from __future__ import annotations

from collections.abc import Callable

from .case import Case, Place

Arrange = Callable[[Place], list[str]]


def typed(*arguments: str) -> Arrange:
    return lambda place: list(arguments)


def train(*arguments: str) -> Arrange:
    """`hyperion train` of a config that is right."""
    return lambda place: ["train", place.config(), *arguments]


def _into_a_file(place: Place) -> list[str]:
    place.write("out", "mine")
    return ["train", place.config(), "--output_dir", "out"]


def _into_a_folder_in_use(place: Place) -> list[str]:
    place.write("out/notes.txt", "mine")
    return ["train", place.config(), "--output_dir", "out"]


def _resume_a_folder_of_something_else(place: Place) -> list[str]:
    place.write("out/notes.txt", "mine")
    return ["train", place.config(), "--output_dir", "out", "--resume"]


def _resume_what_is_finished(place: Place) -> list[str]:
    place.write("out/hyperion.json", "{}")
    return ["train", place.config(), "--output_dir", "out", "--resume"]


def _brackets(place: Place) -> list[str]:
    place.config()
    return ["validate", "[/red]confi.yaml"]


def _schema_into_no_folder(place: Place) -> list[str]:
    return ["schema", "--output", "no/such/schema.json"]


def case(what: str, arrange: Arrange, *says: str) -> Case:
    return Case("command line", what, arrange, says)


CASES: tuple[Case, ...] = (
    case("a command is misspelt", typed("trian", "config.yaml"), "hyperion: No such command 'trian'", "`train`"),
    case("a subcommand is misspelt", typed("plugins", "lits"), "No such command 'lits'", "did you mean `list`?"),
    case("an option is misspelt", train("--outptu_dir", "out"), "there is no option --outptu_dir", "`--output_dir`"),
    case("an option of another tool", train("--num_gpus", "4"), "hyperion train: there is no option --num_gpus",
         "hyperion train --help"),
    case("an option without its value", train("--output_dir"), "--output_dir", "argument"),
    case("no config", typed("train"), "hyperion train: Missing argument 'config'", "it is used so: hyperion train"),
    case("two configs", typed("validate", "one.yaml", "two.yaml"), "unexpected extra argument", "two.yaml"),
    case("a config that is not there", typed("train", "none.yaml"), "none.yaml: there is no such file",
         "give the path of a YAML or JSON file"),
    case("a path that looks like markup", _brackets, "[/red]confi.yaml: there is no such file"),
    case("an unknown kind of plugin", typed("plugins", "list", "--kind", "adaptor"),
         "no kind of plugin is called 'adaptor'", 'did you mean "adapter"?'),
    case("information on a plugin that is misspelt", typed("plugins", "info", "lroa"), 'a plugin called "lroa"',
         'did you mean "lora"?'),
    case("a checkup of a plugin that is not installed", typed("plugins", "doctor", "vera"), 'a plugin called "vera"',
         "hyperion plugins list"),
    case("a time that is none", typed("plugins", "doctor", "--timeout", "soon"), "Invalid value for '--timeout'"),
    case("a new plugin of a kind that has no template", typed("plugins", "new", "adaptor", "mine"),
         '"adaptor" is no kind of plugin', 'did you mean "adapter"?'),
    case("a new plugin with a name that none can have", typed("plugins", "new", "adapter", "9 Lives"),
         '"9 Lives" is no name for a plugin', "a letter first"),
    case("the schema into a folder that is not there", _schema_into_no_folder, "the schema cannot be written",
         "No such file or directory", "another --output"),
    case("a file as output folder", _into_a_file, "the output folder out is a file", "choose another output_dir"),
    case("an output folder that is in use", _into_a_folder_in_use, "the output folder out is not empty",
         "never overwrites", "--resume"),
    case("--resume without a run", train("--output_dir", "out", "--resume"), "no complete checkpoint in out",
         "without --resume"),
    case("--resume in a folder of something else", _resume_a_folder_of_something_else, "no complete checkpoint in out"),
    case("--resume of a finished run", _resume_what_is_finished, "the run in out is finished", "another output_dir"),
    case("--locked without a lock file", train("--locked"), "hyperion.lock", "hyperion lock config.yaml"),
    case("--report-to an unknown tracker", train("--report-to", "wandbb"), 'no tracker is called "wandbb"',
         "config.yaml has 1 problem", 'did you mean "wandb"?'),
    case("a model of the hub, without network", lambda place: ["train", place.config(base_model="owner/model")],
         "'owner/model'", "HF_HUB_OFFLINE"),
    case("a model's folder is misspelt, without network",
         lambda place: ["train", place.config(base_model="tiny-modle")], "'tiny-modle'",
         "there is no folder or file called tiny-modle"),
)  # fmt: skip
