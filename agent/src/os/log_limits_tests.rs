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

/// Lets the current minute be over.
fn end(throttle: &Throttle) {
    throttle.minute().began = Some(Instant::now().checked_sub(MINUTE).unwrap());
}

#[test]
fn lines_over_the_limit_are_logged_at_debug() {
    let throttle = Throttle::new("strangers", 2);
    let levels: Vec<_> = (0..4).map(|_| throttle.level(Level::Info)).collect();
    assert_eq!(levels, [Level::Info, Level::Info, Level::Debug, Level::Debug]);
    end(&throttle);
    assert_eq!(throttle.level(Level::Info), Level::Info, "the next minute starts over");
}

#[test]
fn lines_that_were_left_out_are_counted() {
    let throttle = Throttle::new("strangers", 1);
    assert_eq!(throttle.end_minute(), Ok((0, Level::Debug)), "nothing was logged");
    for level in [Level::Info, Level::Info, Level::Warn, Level::Info, Level::Debug] {
        throttle.level(level);
    }
    assert_eq!(throttle.end_minute(), Err(3), "the minute goes on");
    assert!(throttle.report());
    end(&throttle);
    assert_eq!(throttle.end_minute(), Ok((3, Level::Warn)), "debug lines are not left out");
    assert_eq!(throttle.end_minute(), Ok((0, Level::Debug)), "counted once");
    assert!(!throttle.report());
}
