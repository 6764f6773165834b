"""The judge: measures any autoencoder by one stated protocol and writes results and a report."""
