"""Names of methods: those of other packages, and names that clash."""
import dataclasses

import pytest

from jaxalign.config import registry
from jaxalign.config.recipes import default, parse
from jaxalign.errors import UserError
from jaxalign.methods import draft, refl


@dataclasses.dataclass
class EntryPoint:
  name: str
  value: str = "other_package:method"

  def load(self):
    return refl


def install(monkeypatch, *names):
  found = lambda group: [EntryPoint(name) for name in names if group == "jaxalign.methods"]
  monkeypatch.setattr("importlib.metadata.entry_points", found)


def test_other_packages_add_methods(monkeypatch):
  with pytest.raises(UserError, match="method.name='theirs' is unknown; choose one of .*alignprop"):
    registry.load_method("theirs")
  install(monkeypatch, "theirs")
  assert registry.load_method("theirs") is refl
  config = parse(default("theirs"))
  assert config.method_name == "theirs" and isinstance(config.method, refl.Config)
  assert registry.load_method("draft") is draft               # those of here stay
  with pytest.raises(UserError, match="choose one of .*svdd, theirs"):
    registry.load_method("their")


@pytest.mark.parametrize("names", [("mapo",), ("theirs", "theirs")])
def test_a_name_cannot_be_registered_twice(monkeypatch, names):
  install(monkeypatch, *names)
  with pytest.raises(UserError, match="registered twice; other_package:method is the second"):
    registry.load_method("nabla_gfn")
