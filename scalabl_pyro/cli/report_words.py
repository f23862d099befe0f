"""What each metric of a report means, in one sentence for readers who do not know it."""

#: Sentences by the name of the metric.
MEANING = {
    "accuracy": "Share of right answers. Higher is better.",
    "subset_accuracy": "Share of rows of which every label is right. Higher is better.",
    "f1_micro": "Balance of precision and recall, over all labels together. Higher is better.",
    "f1_macro": "Balance of precision and recall, averaged over the labels. Higher is better.",
    "nll": "Negative log likelihood: large if the model was sure and wrong. Lower is better.",
    "ece": "Expected calibration error: mean gap between how sure the model is and how often it is right. 0 is best.",
    "adaptive_ece": "The same, in groups of equally many rows.",
    "brier": "Squared distance between the probabilities and the right answer. Lower is better.",
    "error_auroc": "How well the uncertainty tells wrong answers from right ones: 1 is perfect, 0.5 is chance.",
    "aurc": "Mean share of wrong answers, if only the most certain rows are answered. Lower is better.",
    "rmse": "Root of the mean squared error, in the units of the answer. Lower is better.",
    "mae": "Mean absolute error, in the units of the answer. Lower is better.",
}
