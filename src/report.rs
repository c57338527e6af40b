//! One self-contained HTML page from plain numbers.
