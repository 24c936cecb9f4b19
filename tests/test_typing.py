"""What type checkers and editors see: a typed package, and the settings as attributes of each class."""

import configparser
import inspect
from pathlib import Path

from cases import every_optimizer

import fusedopt

PACKAGE = Path(fusedopt.__file__).parent


def test_the_package_is_typed():
    """Also where it is installed, into which only what setup.cfg lists is copied."""
    assert (PACKAGE / "py.typed").exists()
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parent.parent / "setup.cfg")
    assert setup["options.package_data"]["fusedopt"] == "py.typed"


@every_optimizer
def test_every_setting_is_annotated_as_its_field(name):
    cls = fusedopt.registry[name]
    annotated = {}
    for base in reversed(cls.__mro__):
        annotated |= inspect.get_annotations(base) if base.__module__.startswith("fusedopt.") else {}
    fields = cls.settings_class.fields()
    assert {name: field.type for name, field in fields.items()} == {name: annotated.get(name) for name in fields}
