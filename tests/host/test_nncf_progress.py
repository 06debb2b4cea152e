"""NNCF draws its bars on rich's global console: quiet there is quiet everywhere."""

from __future__ import annotations

import nncf
import pytest
import rich
from support.networks import images, trained

from nncf_compactprune.host.nncf_progress import no_bars_in_pipes, track


def test_bars_stay_out_of_pipes(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = trained("plain"), images()
    nncf.batch_norm_adaptation(model, nncf.Dataset([x]))
    assert "Batch norm adaptation" in capsys.readouterr().out  # NNCF itself writes one: no need for us otherwise
    with no_bars_in_pipes():
        nncf.batch_norm_adaptation(model, nncf.Dataset([x]))
        assert list(track([1, 2], "Counting")) == [1, 2]
    assert list(track(iter([1, 2]), "Counting")) == [1, 2]
    out, err = capsys.readouterr()
    assert (out.strip(), err) == ("", "")  # NNCF 3.3 ends a bar that is not shown with an empty line
    assert not rich.get_console().quiet
