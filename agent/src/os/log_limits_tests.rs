use super::*;

#[test]
fn a_failure_is_logged_when_it_starts_changes_and_ends() {
    let mut repeated = Repeated::new("fetching the keys");
    assert_eq!(repeated.note_success(), None);
    assert_eq!(repeated.note_failure("refused".into()).unwrap(), "fetching the keys: refused");
    assert_eq!(repeated.note_failure("refused".into()), None);
    assert_eq!(
        repeated.note_failure("timeout".into()).unwrap(),
        "fetching the keys: failure 3, now: timeout"
    );
    assert_eq!(repeated.note_failure("refused".into()), None, "texts that alternate are logged once");
    let line = repeated.note_success().unwrap();
    assert!(line.starts_with("fetching the keys: recovered after 4 failures ("), "{line}");
    assert_eq!(repeated.note_success(), None);
    assert!(repeated.note_failure("refused".into()).is_some(), "a new failure is logged again");
}

#[test]
fn lines_over_the_limit_are_logged_at_debug() {
    let throttle = Throttle::new(2);
    let levels: Vec<_> = (0..4).map(|_| throttle.level(Level::Info)).collect();
    assert_eq!(levels, [Level::Info, Level::Info, Level::Debug, Level::Debug]);
    // The next minute starts over.
    throttle.window.lock().unwrap().0 = Some(Instant::now().checked_sub(MINUTE).unwrap());
    assert_eq!(throttle.level(Level::Info), Level::Info);
}
