"""What a finished run leaves for readers: self-contained HTML reports, and figures as images."""
