'use strict';
{
  const data = JSON.parse(document.getElementById('data').textContent);
  const parts = data.model.before === undefined ? reportPage(data) : comparisonPage(data);
  document.getElementById('page').append(html('main', {}, parts.filter(Boolean)));
}
