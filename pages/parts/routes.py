"""Which page shows which kind of run."""

PAGES = {
    "model": "pages/model.py",
    "outliers": "pages/outliers.py",
    "sensitivity": "pages/sensitivity.py",
    "fine_tune": "pages/fine_tune.py",
    "compare": "pages/compare.py",
    "runs": "pages/runs.py",
}

PAGE_OF_KIND = {
    "scan": PAGES["outliers"],
    "probe": PAGES["sensitivity"],
    "tune": PAGES["fine_tune"],
    "preview": PAGES["fine_tune"],
    "replay": PAGES["runs"],
    "export": PAGES["fine_tune"],
    "load": PAGES["model"],
    "unload": PAGES["model"],
}

KIND_TITLES = {
    "scan": "Activation scan",
    "probe": "Sensitivity probe",
    "tune": "Fine-tuning",
    "preview": "Preview",
    "replay": "Replay",
    "export": "Export",
    "load": "Load",
    "unload": "Unload",
}
