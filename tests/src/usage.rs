//! `--help` of the programs of this package.

/// Prints `text` if the first argument asks for help; the program then ends with code 0.
pub fn is_help(text: &str) -> bool {
    let asked = std::env::args_os().nth(1).is_some_and(|word| word == "-h" || word == "--help");
    if asked {
        println!("{text}");
    }
    asked
}
