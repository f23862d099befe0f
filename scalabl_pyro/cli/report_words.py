"""What each metric and column of a report means, in one sentence for readers who do not know it."""

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
#: Sentences by the name of the column of a list of rows.
COLUMNS = {
    "prediction": "The answer of the model.",
    "probability": "How sure the model is of its answer: the mean of its probability over the draws.",
    "total": "Uncertainty about the answer, in nats: 0 is sure. It is the sum of the next two.",
    "aleatoric": "The part of it that lies in the row: each draw finds the row unclear. More training does not help.",
    "epistemic": "The part of it that lies in the model: the draws disagree. More rows to learn from would help.",
    "sd": "Standard deviation of the answer, as the model sees it, in the units of the answer.",
    "low": "Lower end of an interval that holds the answer with 90 % probability, as the model sees it.",
    "high": "Upper end of this interval.",
    "sds_off": "Distance between answer and prediction, in standard deviations. Few rows are more than 3 away.",
    "target": "The right answer, as the table says.",
}
