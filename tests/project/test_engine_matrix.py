"""`docs/distributed.md` prints the matrix of models and engines from the results of its tests."""

from support.engine_matrix import CELLS, TOLERANCE, parts_of_page, read_results, table


def test_page_prints_the_results():
    assert parts_of_page()[1] == table(read_results())


def test_every_cell_is_exact():
    cells = {
        (engine, cell["model"], cell["way"]): cell
        for engine, column in read_results().items()
        for cell in column["cells"]
    }
    assert cells.keys() == set(CELLS)
    for name, cell in cells.items():
        assert cell["difference"] <= TOLERANCE, name
