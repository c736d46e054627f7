"""Metadata of every quality, read without importing anything."""

from __future__ import annotations

import json

import pytest
from hyperion_core.distributions import installed_plugins


def written(fake_dist, name="acme-x", **options):
    folder = fake_dist(name, {"hyperion.observers": {"x": "acme_x:Fake"}}, {"acme_x": "raise SystemExit"}, **options)
    return folder, installed_plugins([str(folder)])


@pytest.mark.parametrize(
    "direct, origin",
    [
        ({"url": "file:///home/me/acme", "dir_info": {"editable": True}}, "editable"),
        ({"url": "file:///home/me/acme", "dir_info": {}}, "local folder"),
        ({"url": "file:///home/me/acme-1.0.whl", "archive_info": {}}, "local file"),
        ({"url": "https://x.org/a.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}, "https://x.org/a.git@abc"),
        ({"url": "https://x.org/a.whl", "archive_info": {}}, "https://x.org/a.whl"),
        ([], "index"),
    ],
)
def test_the_origin_tells_where_from_and_never_a_folder_of_this_machine(fake_dist, direct, origin):
    _, (entry,) = written(fake_dist, files={"direct_url.json": json.dumps(direct)})
    assert entry.origin == origin


def test_a_direct_url_that_is_no_json_is_as_none(fake_dist):
    _, (entry,) = written(fake_dist, files={"direct_url.json": "{"})
    assert entry.origin == "index"


def test_an_older_copy_further_down_the_path_is_not_a_second_plugin(fake_dist):
    first, _ = written(fake_dist, name="Acme_X", version="2.0")
    second, _ = written(fake_dist, name="acme-x", version="1.0")
    (entry,) = installed_plugins([str(first), str(second)])
    assert (entry.distribution, entry.version) == ("acme-x", "2.0")


def test_the_order_is_stable_and_other_groups_are_left_out(fake_dist):
    points = {
        "hyperion.schedulers": {"b": "m:B", "a": "m:A"},
        "hyperion.adapters": {"c": "m:C"},
        "hyperion.unheard_of": {"d": "m:D"},
        "console_scripts": {"e": "m:E"},
    }
    folder = fake_dist("acme-many", points, {"m": ""})
    assert [(e.kind, e.name) for e in installed_plugins([str(folder)])] == [
        ("adapter", "c"),
        ("scheduler", "a"),
        ("scheduler", "b"),
    ]


def test_requirements_of_extras_and_other_platforms_do_not_count(fake_dist):
    requires = [
        "Hyperion_Core>=1,<2",
        "no-such; extra == 'more'",
        "no-such; sys_platform == 'beos'",
        "not a requirement!",
    ]
    _, (entry,) = written(fake_dist, requires=requires)
    assert entry.missing == () and entry.fits_contract()


def test_leftovers_of_an_interrupted_uninstall_hide_nobody(fake_dist):
    folder, _ = written(fake_dist)
    leftover = folder / "gone-1.0.dist-info"
    leftover.mkdir()
    (leftover / "entry_points.txt").write_text("[hyperion.observers]\ny = gone:Y\n")
    (leftover / "METADATA").write_text("\n")
    assert [entry.name for entry in installed_plugins([str(folder)])] == ["x"]


@pytest.mark.parametrize("version", ["", "not.a.version"])
def test_a_requirement_with_a_broken_version_is_missing(fake_dist, version):
    fake_dist("some-library", {}, {}, version="1.0")
    metadata = fake_dist.folders[0] / "some_library-1.0.dist-info" / "METADATA"
    metadata.write_text(f"Metadata-Version: 2.4\nName: some-library\n{f'Version: {version}' if version else ''}\n")
    _, (entry,) = written(fake_dist, requires=["hyperion-core>=1", "some-library>=1"])
    (missing,) = entry.missing
    assert missing.startswith("some-library>=1 (")
