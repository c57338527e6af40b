//! The program `crosscoder`.

fn main() -> std::process::ExitCode {
    crosscoder::cli::run()
}
