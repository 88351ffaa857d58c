"""`docs/distributed.md` prints the matrix of models and engines from the results of its tests."""

from support.engine_matrix import CELLS, PAGE, TOLERANCE, read_results, table
from support.survey_pages import read_part


def test_page_prints_the_results():
    assert read_part(PAGE, "engines") == table(read_results())


def test_every_cell_is_exact():
    cells = {
        (engine, cell["model"], cell["way"]): cell
        for engine, column in read_results().items()
        for cell in column["cells"]
    }
    assert cells.keys() == set(CELLS)
    for name, cell in cells.items():
        assert cell["difference"] <= TOLERANCE, name
