"""What the package says: commands print it, and from Python ``logging`` decides."""

import logging

from afa_jax.logs import LOGGER, printed


def test_each_line_is_printed_once_and_only_where_it_is_wanted(capsys, caplog):
    LOGGER.info("before")
    with printed(), printed():
        LOGGER.info("within")
    with printed(False):
        LOGGER.info("unwanted")
    assert capsys.readouterr().out == "within\n" and not caplog.records
    caplog.set_level(logging.INFO)
    LOGGER.info("after")
    assert caplog.messages == ["after"] and capsys.readouterr().out == ""
