"""The core of ZOScope: everything but the pages. Knows no Streamlit."""
