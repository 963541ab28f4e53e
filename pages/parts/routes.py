"""Which page shows which kind of run."""

PAGES = {
    "model": "pages/model.py",
    "outliers": "pages/outliers.py",
    "mechanism": "pages/mechanism.py",
    "sensitivity": "pages/sensitivity.py",
    "fine_tune": "pages/fine_tune.py",
    "compare": "pages/compare.py",
    "runs": "pages/runs.py",
}

PAGE_OF_KIND = {
    "scan": PAGES["outliers"],
    "mechanism": PAGES["mechanism"],
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
    "mechanism": "Mechanism",
    "probe": "Sensitivity probe",
    "tune": "Fine-tuning",
    "preview": "Preview",
    "replay": "Replay",
    "export": "Export",
    "load": "Load",
    "unload": "Unload",
}
