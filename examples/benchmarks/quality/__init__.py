"""The benchmark of uncertainties: accuracy and calibration of ScalaBL and the baselines on one budget."""
