_HOMES = {
    "make_app": "service",
    "serve": "service",
    "ScalaBLClassifier": "sklearn",
    "ScalaBLRegressor": "sklearn",
}

__all__ = [
    "ScalaBLClassifier",
    "ScalaBLRegressor",
    "make_app",
    "serve",
]
