//! The service manager's protocol: readiness and status by sd_notify.
