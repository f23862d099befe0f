_HOMES = {
    "make_app": "service",
    "serve": "service",
    "ScalaBLClassifier": "sklearn",
    "ScalaBLRegressor": "sklearn",
    "ScalaBLMixin": "trainer",
    "ScalaBLTrainer": "trainer",
}

__all__ = [
    "ScalaBLClassifier",
    "ScalaBLMixin",
    "ScalaBLRegressor",
    "ScalaBLTrainer",
    "make_app",
    "serve",
]
