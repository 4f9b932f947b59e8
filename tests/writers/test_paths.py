"""Files are replaced at once or not at all."""

import pytest

from ant_jax.writers._paths import replacing


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as beside:
        beside.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as beside:
        beside.write_text("half of the ne")
        assert 1 / 0
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
