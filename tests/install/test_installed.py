"""Each way that brings the pack into a ComfyUI brings all of it, and ComfyUI starts with it: the Manager's command line, git, and the registry's archive."""
import pytest
from helpers_install import NODES, WITHDRAWN, contents, git, shipped, tracked

from demo.comfy_path import ROOT

WAYS = ("managed", "pulled", "portable")


@pytest.fixture(params=WAYS)
def boot(request):
    started = request.getfixturevalue(request.param)
    return getattr(started, "boot", started)


def test_comfyui_has_all_nine_nodes(boot):
    assert boot.nodes == NODES


def test_its_log_says_nothing_of_the_pack_but_how_long_the_import_took(boot):
    assert len(boot.said_of_the_pack) == 1 and "IMPORT FAILED" not in boot.said_of_the_pack[0], boot.said_of_the_pack
    assert boot.said_of_the_pack[0].endswith(f"{boot.seconds:.1f} seconds: {boot.folder}")


def test_the_page_is_given_every_file_of_the_web_folder(boot):
    assert boot.web == {name: content for name, content in boot.files.items() if name.startswith("web/")}
    assert {f"web/{name}" for name in boot.listed} == {name for name in boot.web if name.endswith(".js")} and "wanlite.js" in boot.listed


def test_the_page_is_offered_every_template(boot):
    assert boot.templates == {path.stem for path in (ROOT / "example_workflows").glob("*.json")}


def test_the_managers_command_line_installs_the_version_that_is_published(managed):
    assert "withdrawn.js" in managed.listed and managed.files.keys() == {*tracked(), *WITHDRAWN}


def test_after_a_pull_and_a_restart_it_is_what_a_clone_is_and_nothing_of_the_older_version_is_left(pulled, origin, tmp_path):
    git(tmp_path, "clone", "--quiet", str(origin), "WanLite")
    assert pulled.files == contents(tmp_path / "WanLite") == {name: (ROOT / name).read_bytes() for name in tracked()}
    assert "withdrawn.js" not in pulled.listed
    assert git(pulled.folder, "status", "--porcelain") == ""         # the pack writes nothing beside its code


def test_the_archive_unpacks_to_what_it_has_to_hold(portable):
    assert portable.boot.files == {name: (ROOT / name).read_bytes() for name in shipped()}
