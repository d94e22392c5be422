from tests.pages import check_links, run_page


def test_every_block_of_the_tour_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page("docs/tour.md", least=20)


def test_links_within_the_tour_lead_somewhere():
    check_links("docs/tour.md")


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = run_page("README.md")
    assert namespace["logits"].shape == (1, 19, 77)
    assert len(namespace["text"]) == 40
