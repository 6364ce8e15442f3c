"""What metrics are called: a fixed order, and nothing that a result holds is lost."""

from dist_proxygml.evaluation.metric_names import name_metrics


def test_metrics_come_in_reading_order_and_deviations_with_what_they_belong_to() -> None:
    keys = [
        "nmi",
        "nmi_sd",
        "map@r",
        "recall@10",
        "recall@2",
        "recall@1",
        "mrr",
        "odd_sd",
        "ir_recall@5",
        "legacy_recall@1",
    ]
    names = name_metrics(keys)
    assert [name.label for name in names] == [
        *("Recall@1", "Recall@2", "Recall@10", "MAP@R", "MRR", "NMI", "Recall@1 as published"),
        *("ir_recall@5", "odd_sd"),
    ]
    assert names[2].meaning == "queries with a right answer among the first 10"
    assert names[-2].meaning == ""
